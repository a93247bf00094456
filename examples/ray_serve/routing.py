"""Which replica answers a request, and how many replicas there are. Ray pickles this module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray.serve.autoscaling_policy import replica_queue_length_autoscaling_policy
from ray.serve.config import AutoscalingContext
from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import MultiplexMixin, PendingRequest, RunningReplica

QUEUE = "queued_in_engine"
MOST_QUEUED = 2.0
"""Mean requests in an engine's queue above which one more replica is wanted. Lower scales earlier.
Such requests wait for memory or for a place in the batch: the replica is full."""


class ChatRouter(MultiplexMixin, ConsistentHashRouter):
    """Routes a request to a replica that has its adapter; of several, always the same for a chat.

    Order: replicas that have the adapter, then those with the fewest adapters, then the others;
    within each, that of Serve's hash ring for the session. A replica with ``max_ongoing_requests``
    refuses, and the next one is asked.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        ranks = await super().choose_replicas(candidate_replicas, pending_request)
        adapter = pending_request.metadata.multiplexed_model_id if pending_request else ""
        if not adapter:
            return ranks
        in_ring_order = [replica for rank in ranks for replica in rank]
        tiers = self.rank_replicas_via_multiplex(in_ring_order, adapter)
        return [[replica] for tier in tiers for replica in tier]


@dataclass(frozen=True, slots=True)
class Routing:
    """A router of Serve's, and whether requests carry their adapter as Serve's model id."""

    router: str
    by_adapter: bool


_DEFAULT = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"
ROUTINGS = {
    "round_robin": Routing("ray.serve.experimental.round_robin_router.RoundRobinRouter", False),
    "default": Routing(_DEFAULT, False),
    "adapter": Routing(_DEFAULT, True),
    "adapter_session": Routing("routing.ChatRouter", True),
}


def num_replicas_wanted(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """As many replicas as Serve's own policy wants by ongoing requests, or one more than there are
    while the engines' queues are long. Serve applies its delays and bounds to the result.
    """
    by_requests, state = replica_queue_length_autoscaling_policy(context)
    queues = (context.aggregated_metrics or {}).get(QUEUE, {})
    if mean(list(queues.values())) > MOST_QUEUED:
        return max(by_requests, context.current_num_replicas + 1), state
    return by_requests, state


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
