"""Seeded template sentences, for training the tokenizer and as the demo's user messages."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

NOUNS: Sequence[str] = (
    "account adapter answer appointment archive article balance bank basket battery benefit "
    "bicycle bill board boat book border bottle branch bridge budget building button camera "
    "campaign card career carpet castle chair channel chapter chart city claim class client "
    "clinic cloud coast code coffee college colour comment company concert contract corner "
    "country course cup customer dealer degree desert design detail dinner discount doctor "
    "document dollar door driver editor effect email engine error event exam expert factory "
    "farm field figure film filter flight floor flower folder adapter_table form friend garden "
    "gate glass goal grant group guide hammer harbour hotel house hospital idea image "
    "invoice island item jacket journal journey judge kernel key kitchen ladder lake lamp "
    "language law lawyer leader lesson letter level licence light limit line list loan lock "
    "machine manual map market meal meeting member memory menu message metal method minute "
    "mirror model moment month morning motor mountain museum network night note notebook "
    "number nurse object ocean offer office option orange order owner packet page painter "
    "paper parcel parent park part partner passenger password path patient payment pencil "
    "people phone picture planet plant plate player pocket poem point policy portal "
    "postcard price printer prize problem product profit project question queue radio rail "
    "rate reader reason receipt recipe record refund region report result ring river road "
    "roof room rule salary sample school science screen season seat secret seller sensor "
    "server shelf ship shop signal singer sister site sketch soldier song spoon spring "
    "stage stamp star station statue storm story street student subject suit summer "
    "supplier surface symbol system table tailor target tax teacher team ticket tool topic "
    "tower town toy track train tree trip truck tunnel uncle unit user valley value vendor "
    "version village visitor voice wallet warning water weather website week wheel wind "
    "window winter winner wire word worker world writer year zone"
).split()

VERBS: Sequence[str] = (
    "accept adapt add allow answer appear approach ask assign attach attend avoid bake "
    "balance belong borrow call cancel carry change charge check clean climb collect "
    "compare confirm connect consider contact cook correct count cover create deliver "
    "demand describe design develop discover discuss divide double earn edit enjoy enter "
    "examine exchange expect explain export extend fill filter finish fix follow gather "
    "guess handle happen help import improve inform inspect install invite join jump keep "
    "label land learn lift list listen load look maintain manage mark measure mention mix "
    "move name need notice obtain offer open order pack paint pass perform pick place plan "
    "play point prefer prepare present press print produce promise protect publish pull "
    "push reach receive recommend record reduce refund refuse release remain remember "
    "remind remove rent repair repeat replace reply report request require reserve return "
    "review save search select send serve share show sign sort start stay stop store study "
    "suggest support talk test thank touch trade train transfer translate travel trust turn "
    "update use visit wait walk want warn wash watch wish wonder work worry wrap write"
).split()

ADJECTIVES: Sequence[str] = (
    "active ancient basic blue brave bright broad calm central cheap clean clear clever "
    "cold common complete cool correct curious current deep direct distant early easy empty "
    "equal exact famous fast final fine firm foreign formal fresh full gentle golden grand "
    "green happy heavy honest large late legal light local long loud low main major mild "
    "minor modern narrow native new normal open patient perfect plain polite poor popular "
    "private proper proud public quick quiet rapid rare ready real recent regular rich "
    "round safe secure sharp short silent simple slow small smart smooth soft solid special "
    "stable steady strange strong sudden sweet tall thick thin tidy tiny typical urgent "
    "useful usual valid warm weak wide wise wooden young"
).split()

_TEMPLATES: Sequence[str] = (
    "Could you {verb} the {adjective} {noun} before the {noun} {verb}s?",
    "Please {verb} my {noun}, then {verb} the {noun}s from {number}.",
    "I {verb}ed the {noun} {adjective}ly, but the {noun} is still {adjective}.",
    "What does the {adjective} {noun} {verb} when the {noun} is {verb}ing?",
    "The {noun} and the {noun} {verb} {number} {adjective} {noun}s every {noun}.",
    "How should we {verb} a {noun} that was {verb}ed with the {noun}?",
    "There are {number} {adjective} {noun}s in the {noun}; {verb} them one by one.",
    "My {noun} said that {verb}ing is {adjective}, so {verb} it for the {noun}.",
    "If you {verb} this {noun}, I will {verb} the other {noun}s later.",
    "Why is the {noun} of our {noun} less {adjective} than their {noun}?",
)


_BLANK = re.compile(r"\{(noun|verb|adjective|number)\}(s|ed|ing|ly)?")


def sentence(rng: random.Random) -> str:
    """One random sentence; depends only on the generator's state."""
    words = {"noun": NOUNS, "verb": VERBS, "adjective": ADJECTIVES}

    def fill(blank: re.Match[str]) -> str:
        kind, suffix = blank[1], blank[2] or ""
        if kind == "number":
            return str(rng.randrange(2, 2000))
        return inflect(rng.choice(words[kind]), suffix)

    return _BLANK.sub(fill, rng.choice(_TEMPLATES))


def paragraph(seed: str, num_sentences: int) -> str:
    """``num_sentences`` sentences that depend only on ``seed``."""
    rng = random.Random(seed)
    return " ".join(sentence(rng) for _ in range(num_sentences))


def inflect(word: str, suffix: str) -> str:
    """``word`` with the ending "s", "ed", "ing", "ly" or "", spelled by English's regular rules."""
    if suffix in ("ed", "ing") and word.endswith("e"):
        return word[:-1] + suffix
    if word.endswith("y") and word[-2] not in "aeou" and suffix != "ing" and suffix:
        return word[:-1] + {"s": "ies", "ed": "ied", "ly": "ily"}[suffix]
    if suffix == "s" and word.endswith(("s", "x", "ch", "sh")):
        return word + "es"
    if suffix == "ly" and word.endswith("le"):
        return word[:-1] + "y"
    return word + suffix


def vocabulary() -> frozenset[str]:
    """Every inflected word a sentence can contain."""
    forms = {inflect(noun, suffix) for noun in NOUNS for suffix in ("", "s")}
    forms |= {inflect(verb, suffix) for verb in VERBS for suffix in ("", "s", "ed", "ing")}
    forms |= {inflect(adjective, suffix) for adjective in ADJECTIVES for suffix in ("", "ly")}
    return frozenset(forms | set(re.findall("[A-Za-z]+", _BLANK.sub("", " ".join(_TEMPLATES)))))
