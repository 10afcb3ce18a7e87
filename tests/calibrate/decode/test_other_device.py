"""The engine where tensors lie on a device that numpy cannot look into."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from other_device import OTHER, Elsewhere, ElsewhereModel, other_device
from toy_models import TableModel, random_logits

from calibrate.decode.engine import DecodingSettings, decode_together
from calibrate.run.prompts import TokenizedPrompt
from hlmtheory.policies import Policy, policy_class, policy_from_settings, policy_names
from hlmtheory.sampled_law import PLAIN, Sampling
from hlmtheory.scores import score_named

VOCAB = 90
SETTINGS = {
    "cu-hlm-offline": {"num_entries": 20},
    "cu-hlm-online": {"theta": 0.3, "eta": 1.0, "slope": 0.6, "intercept": 0.0},
}
COUNTED = ("draft_token", "output_token", "skipped", "accepted", "draft_rank", "policy_entries")


def every_policy() -> dict[str, Policy]:
    """All that are registered, one under a cap, and one with a score that is drawn."""
    policies = {
        name: policy_from_settings(
            name, SETTINGS.get(name, {}), 0.7 if policy_class(name).gated else None
        )
        for name in policy_names()
    }
    policies["capped"] = policy_from_settings("coupled", {"cap": 0.4}, 0.8)
    policies["drawn"] = policy_from_settings("u-hlm", {}, 0.7, score_named("uncertainty_sampled"))
    return policies


@pytest.mark.parametrize("sampling", [PLAIN, Sampling(0.8, 30, 0.9, 1.2)], ids=str)
def test_every_policy_decodes_there_what_it_decodes_here(rng, sampling):
    models = [TableModel(z) for z in random_logits(rng, VOCAB, VOCAB)]
    prompts = [TokenizedPrompt(f"p{i}", (1 + i, 2 + i)) for i in range(5)]
    settings = DecodingSettings(sampling=sampling, max_new_tokens=3, batch_size=5, seed=3)
    policies = every_policy()
    (here,) = decode_together(*models, prompts, policies, settings, (5,))
    with other_device():
        moved = [ElsewhereModel(model) for model in models]
        (there,) = decode_together(*moved, prompts, policies, settings, (5,))
    for name in policies:
        found, expected = there[name].columns, here[name].columns
        assert found.keys() == expected.keys()
        for column, values in expected.items():
            assert found[column].dtype == values.dtype
            if column in COUNTED:
                np.testing.assert_array_equal(found[column], values, err_msg=f"{name} {column}")
            else:
                np.testing.assert_allclose(
                    found[column], values, rtol=1e-4, atol=1e-6, err_msg=f"{name} {column}"
                )


def test_the_other_device_is_as_strict_as_an_accelerator():
    with other_device():
        there, here = torch.arange(3.0, device=OTHER), torch.arange(3.0)
        assert isinstance(there, Elsewhere)
        with pytest.raises(RuntimeError, match="same device"):
            there + here
        with pytest.raises(RuntimeError, match="same device"):
            there[torch.tensor([0, 1])] = here[:2]
        for look in (np.asarray, torch.Tensor.numpy, lambda x: x.numpy()):
            with pytest.raises((TypeError, RuntimeError)):
                look(there)
        # What an accelerator allows too: copies, indices, and single numbers.
        there[torch.tensor([1])] = torch.tensor(7.0)
        assert (there + here.to(OTHER)).cpu().tolist() == [0.0, 8.0, 4.0]
