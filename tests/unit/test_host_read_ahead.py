"""The order in which a host tier reads files that no request needs yet."""

from __future__ import annotations

from tests.unit.test_host_images import IMAGE, Tier


def know_all(tier: Tier, names: str, reads: list[str]) -> None:
    for name in names:
        tier.know(name, lambda name=name: reads.append(name) or IMAGE)  # type: ignore[misc]


def test_read_ahead_reads_files_in_order_while_memory_is_free() -> None:
    tier, reads = Tier(35), list[str]()
    know_all(tier, "abcde", reads)
    tier.bring("b")
    tier.remove("c")
    for _ in range(5):
        tier.read_ahead()
        assert len(tier.reading) <= 1
        tier.finish()
    assert reads == ["b", "a", "d"] and tier.num_bytes == 30
    tier.drop("a")  # read-ahead does not reread dropped images
    tier.read_ahead()
    tier.finish()
    assert reads == ["b", "a", "d", "e"]


def test_read_first_changes_the_order_of_files_that_were_never_read() -> None:
    tier, reads = Tier(1000), list[str]()
    know_all(tier, "abcd", reads)
    tier.bring("b")
    for adapter_id in ("c", "d", "b", "unknown"):
        tier.read_first(adapter_id)
    for _ in range(5):
        tier.read_ahead()
        tier.finish()
    assert reads == ["b", "d", "c", "a"]
