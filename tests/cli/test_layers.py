"""Settings from several layers: which value wins, and where it is from."""

import pytest
import yaml

from sinkformer_pl.cli.layers import Layers, module_names, read_flags
from sinkformer_pl.errors import UserError
from sinkformer_pl.factories import same_class

ADAMW = {"model": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.1, "betas": [0.9, 0.99]}}}}


def merged(*layers, flags=()):
    made = Layers()
    for number, layer in enumerate(layers):
        made.add(layer, f"--config {number}.yaml")
    made.add_flags(read_flags(flags)[1])
    return made


def test_arguments_of_a_class_are_replaced_one_by_one_and_those_of_another_set_aside():
    made = merged(ADAMW, {"model": {"optimizer": {"init_args": {"lr": 0.2}}}}, {"model": {"optimizer": {"eps": 1}}})
    assert made.get("model.optimizer.init_args") == {"lr": 0.2, "betas": [0.9, 0.99], "eps": 1}
    made = merged(ADAMW, {"model": {"optimizer": "SGD"}}, flags=["--model.optimizer.momentum", "0.9"])
    assert made.get("model.optimizer") == {
        "class_path": "SGD",
        "init_args": {"momentum": "0.9"},
        "replaced": {"lr": 0.1, "betas": [0.9, 0.99]},
    }
    assert "replaced" not in merged(ADAMW, {"model": {"optimizer": "AdamW"}}).get("model.optimizer")


def test_flags_enter_names_of_classes_lists_and_data():
    flags = ["--model.schedule", "StepDecay", "--model.schedule.milestones=[0.5]", "--trainer.callbacks+=A"]
    flags += ["--trainer.callbacks.x", "-1", "--trainer.callbacks+=B", "--trainer.callbacks.y", "null", "--data.n", "3"]
    assert merged(flags=flags).values == {
        "model": {"schedule": {"class_path": "StepDecay", "init_args": {"milestones": [0.5]}}},
        "trainer": {
            "callbacks": [
                {"class_path": "A", "init_args": {"x": "-1"}},
                {"class_path": "B", "init_args": {"y": None}},
            ]
        },
        "data": {"n": "3"},
    }


def test_a_class_comes_before_its_arguments_wherever_they_stand():
    optimizer, momentum = ["--model.optimizer", "SGD"], ["--model.optimizer.momentum", "0.9"]
    assert merged(ADAMW, flags=momentum + optimizer).values == merged(ADAMW, flags=optimizer + momentum).values


def test_a_class_may_be_written_as_a_call_as_fit_prints_it(tiny, run):
    flags = ["--model.normalization", "Sinkhorn(n_iters=5)", "--model.normalization.gradient", "detached"]
    made = merged({"model": {"normalization": {"class_path": "Sinkhorn", "init_args": {"n_iters": 9}}}}, flags=flags)
    assert made.get("model.normalization.init_args") == {"n_iters": 5, "gradient": "detached"}
    normalization = yaml.safe_load(run("fit", "--config", tiny, *flags, "--print_config"))["model"]["normalization"]
    assert normalization["init_args"] == {"n_iters": 5, "gradient": "detached"}


def test_a_value_knows_its_file():
    made = merged(ADAMW, {"data": {"init_args": {"size": 3}}}, flags=["--model.optimizer.lr", "1"])
    assert made.source("data.size") == "--config 1.yaml: "
    assert made.source("model.optimizer.betas") == "--config 0.yaml: "
    assert made.source("model.optimizer.lr") == ""
    assert made.source("nothing") == ""


@pytest.mark.parametrize("argv", [["--name"], ["name", "3"], ["run.yaml"], ["--plugins", "a", "--plugins", "b"]])
def test_what_is_no_flag_with_a_value_is_refused(argv):
    with pytest.raises(UserError):
        read_flags(argv)


def test_names_of_modules_and_classes():
    assert module_names("a, b") == module_names("[a, b]") == module_names(["a,b"]) == ["a", "b"]
    assert same_class("Sinkhorn", "sinkformer_pl.normalizations.Sinkhorn")
    assert same_class("sinkformer_pl.Sinkhorn", "sinkformer_pl.normalizations.Sinkhorn")
    assert not same_class("mine.Sinkhorn", "sinkformer_pl.normalizations.Sinkhorn")


def test_the_resolved_settings_fill_in_defaults_and_keep_what_a_new_class_takes_too(tiny, run):
    printed = run("fit", "--config", tiny, "--model.optimizer", "SGD", "--print_config")
    optimizer = yaml.safe_load(printed)["model"]["optimizer"]
    assert optimizer["class_path"] == "torch.optim.SGD"
    # The rate was given; the decay of AdamW is its default, and no one's wish.
    assert (optimizer["init_args"]["lr"], optimizer["init_args"]["weight_decay"]) == (0.003, 0)


def test_arguments_beyond_a_signature_and_times_are_read_again_as_they_were_written(tiny, run, tmp_path):
    strategy = {
        "class_path": "DDPStrategy",
        "init_args": {"process_group_backend": "gloo"},
        "dict_kwargs": {"find_unused_parameters": True},
    }
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    printed = run("fit", "--config", tiny, "--config", "ddp.yaml", "--print_config")
    assert yaml.safe_load(printed)["trainer"]["strategy"]["dict_kwargs"] == {"find_unused_parameters": True}
    (tmp_path / "again.yaml").write_text(printed)
    assert run("fit", "--config", "again.yaml", "--print_config") == printed
