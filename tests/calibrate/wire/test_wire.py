"""Device and server over loopback: the engine's tokens, the bits that theory bills."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from toy_wire import END, VOCAB, VOCABULARY, Running, Toys

from calibrate.decode.engine import decode
from calibrate.wire.client import ServerLink
from calibrate.wire.device import Device, WireAnswer
from calibrate.wire.protocol import Opening
from hlmtheory.cost import payload_bits
from hlmtheory.policies import Policy, policy_class, policy_from_settings, policy_names

SETTINGS = {
    "cu-hlm-offline": {"num_entries": 12},
    "cu-hlm-online": {"theta": 0.1, "eta": 1.0, "slope": 0.8, "intercept": 0.0},
    "ui-hlm": {"importance": {"variant": "topk", "k": 4, "gamma": 1.0}},
}


def make(name: str, **more: object) -> Policy:
    threshold = 0.5 if policy_class(name).gated else None
    return policy_from_settings(name, SETTINGS.get(name, {}) | more, threshold)


def in_one_process(toys: Toys, policy: Policy) -> dict[str, np.ndarray]:
    """The engine's columns, ordered by prompt and step."""
    (batch,) = decode(toys.slm, toys.llm, toys.prompts, policy, toys.settings, [END])
    ids = np.array(batch.prompt_ids)[batch.columns["row"]]
    order = np.lexsort((batch.columns["step"], ids))
    return {name: values[order] for name, values in batch.columns.items()}


def over_the_wire(
    toys: Toys, policy: Policy, server: ServerLink | None, **options: object
) -> list[WireAnswer]:
    slm = None if policy.role == "server" else toys.slm
    server = None if policy.role == "device" else server
    device = Device(slm, policy, toys.settings, VOCAB, VOCABULARY, [END], server, **options)
    return [device.decode(prompt) for prompt in toys.prompts]


@pytest.mark.parametrize("name", [*policy_names(), "capped"])
def test_the_wire_gives_the_tokens_of_one_process(toys, server: Running, name):
    policy = make("u-hlm", cap=0.4) if name == "capped" else make(name)
    expected = in_one_process(toys, policy)
    with ServerLink(server.url) as link:
        tokens = [one for answer in over_the_wire(toys, policy, link) for one in answer.tokens]
    assert [one.output_token for one in tokens] == expected["output_token"].tolist()
    if policy.role == "both":
        assert [one.draft_token for one in tokens] == expected["draft_token"].tolist()
        assert [one.skipped for one in tokens] == expected["skipped"].tolist()
        asked = ~expected["skipped"]
        assert asked.any()
        if policy.gated:
            assert expected["skipped"].any()
        accepted = np.array([one.accepted for one in tokens])
        if policy.draft_sent:
            assert np.array_equal(accepted[asked], expected["accepted"][asked])
        # What is billed is what went, to the bit.
        unseen = np.array([one.num_unseen for one in tokens])
        billed = payload_bits(
            expected["policy_entries"][asked], VOCAB,
            draft_sent=policy.draft_sent, num_unsent=unseen[asked],
        )  # fmt: skip
        assert np.array_equal([one.payload_bits for one in tokens if not one.skipped], billed)


def test_other_random_numbers_give_other_tokens(toys, server: Running):
    """The comparison above can fail."""
    policy = make("u-hlm")
    with ServerLink(server.url) as link:
        mine = over_the_wire(toys, policy, link)
        other = replace(toys, settings=replace(toys.settings, seed=5))
        theirs = over_the_wire(other, policy, link)
    tokens = [
        [one.output_token for answer in run for one in answer.tokens] for run in (mine, theirs)
    ]
    assert tokens[0] != tokens[1]


def test_the_device_of_the_docs_asks_as_it_says(toys, server: Running):
    """docs/phone.md: with nothing decided alone its text is the server's own stream."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "phone.md").read_text()
    code: dict[str, Callable[..., list[int]]] = {}
    exec(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0], code)  # type: ignore[arg-type]
    prompt = [1, 5, 9]
    found = code["answer"](server.url, VOCABULARY, VOCAB, prompt, lambda context: None, 12)
    opening = Opening(VOCAB, VOCABULARY, "llm", {}, {}, 8, (1, 2), 12)
    with ServerLink(server.url) as link:
        link.open(opening, prompt)
        assert found == [one.reply.token for one in link.stream(0, prompt)]

    def every_other(context: list[int]) -> int | None:
        return 7 if len(context) % 2 else None

    mixed = code["answer"](server.url, VOCABULARY, VOCAB, prompt, every_other, 12)
    assert mixed[::2] == [7] * len(mixed[::2])
    assert mixed != found
