"""Weights and optimizer states of version 0.1 load into the networks of today, parameter by parameter.

`data/weights_0_1.pt` was written by version 0.1 (commit 88b9103): for two small networks their hyper-parameters, state,
the state of AdamW after three steps, a batch, its logits, and all parameters after a fourth step.
"""

from pathlib import Path

import pytest
import torch

from sinkformer_pl.tasks import Classifier

FILE = Path(__file__).parent / "data" / "weights_0_1.pt"


@pytest.fixture(scope="module")
def saved():
    return torch.load(FILE, weights_only=True)


@pytest.mark.parametrize("network", ["text", "points"])
def test_a_next_step_is_what_it_was(saved, network):
    old = saved[network]
    model = Classifier(**old["hyper_parameters"])
    model.load_state_dict(dict(old["state_dict"]))
    optimizer = model._optimizer(model.parameters())
    optimizer.load_state_dict(old["optimizer"])
    names = [name.replace(".attention.core.", ".attention.") for name, _ in model.named_parameters()]
    assert names == old["names"]
    assert any("log_temperature" in name for name in names)
    assert any("log_rho" in name or "alpha_logit" in name for name in names)
    logits = model(old["inputs"], old["mask"])
    torch.testing.assert_close(logits, old["logits"], rtol=1e-6, atol=1e-7)
    torch.nn.functional.cross_entropy(logits, old["target"]).backward()
    optimizer.step()
    for name, found, wanted in zip(names, model.parameters(), old["after"], strict=True):
        if name.endswith("attention.key.bias"):
            # Under rows that sum to 1 it moves no output; AdamW steps by what rounding leaves of the gradient.
            torch.testing.assert_close(found.grad, torch.zeros_like(found), rtol=0, atol=1e-7, msg=name)
        else:
            torch.testing.assert_close(found.detach(), wanted, rtol=1e-5, atol=1e-7, msg=name)


def test_a_state_of_today_loads_as_it_is(saved):
    old = saved["text"]
    model, other = (Classifier(**old["hyper_parameters"]) for _ in range(2))
    other.load_state_dict(model.state_dict())
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_key_that_is_missing_is_still_said(saved):
    old = saved["text"]
    state = {key: value for key, value in old["state_dict"].items() if not key.endswith("0.attention.log_temperature")}
    with pytest.raises(RuntimeError, match=r"0\.attention\.core\.log_temperature"):
        Classifier(**old["hyper_parameters"]).load_state_dict(state)
