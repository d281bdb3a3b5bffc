"""Patterns of names."""

import pytest

from sinkformer_pl.errors import UserError
from sinkformer_pl.parts import collapsed, matches, select

NAMES = [
    "backbone.positions",
    "backbone.embed.weight",
    "backbone.embed.bias",
    *(f"backbone.encoder.blocks.{block}.mlp.{layer}.weight" for block in range(11) for layer in (0, 3)),
    "head.weight",
    "head.bias",
]


@pytest.mark.parametrize(
    ("patterns", "chosen"),
    [
        ("head", ["head.weight", "head.bias"]),
        ("*.bias", ["backbone.embed.bias", "head.bias"]),
        ("*bias", ["backbone.embed.bias", "head.bias"]),
        ("head, backbone.positions", ["backbone.positions", "head.weight", "head.bias"]),
        (["head.weight", "head"], ["head.weight", "head.bias"]),
        # 10 isn't 1, and 0-1 isn't a name.
        ("backbone.encoder.blocks.0-1.mlp.3", [f"backbone.encoder.blocks.{k}.mlp.3.weight" for k in (0, 1)]),
        ("*.blocks.9-10.*.0", [f"backbone.encoder.blocks.{k}.mlp.0.weight" for k in (9, 10)]),
        (
            "backbone.encoder.blocks.[02]",
            [f"backbone.encoder.blocks.{k}.mlp.{n}.weight" for k in (0, 2) for n in (0, 3)],
        ),
        ("*", NAMES),
        ((), []),
    ],
)
def test_a_pattern_means_a_name_and_all_below_it(patterns, chosen):
    assert select(NAMES, patterns, "model.freeze") == chosen
    assert [name for name in NAMES if matches(name, patterns)] == chosen


@pytest.mark.parametrize(
    ("patterns", "said"),
    [
        ("backbone.blocks.0-3", ["model.freeze backbone.blocks.0, of backbone.blocks.0-3", "backbone.encoder.blocks"]),
        ("backbone.encoder.blocks.9-11", ["backbone.encoder.blocks.11, of", "blocks.10"]),
        ("bakcbone", ["model.freeze bakcbone:", "did you mean backbone"]),
        # A part of a name is none.
        (["head", "head.w"], ["model.freeze head.w:", "head.weight"]),
        ("encoder", ["model.freeze encoder:", "backbone.positions, backbone.embed, backbone.encoder, head"]),
        ("backbone.encoder.blocks.3-1", ["3-1", "FIRST-LAST"]),
        ("backbone.encoder.blocks.0-999999999", ["at most"]),
    ],
)
def test_a_pattern_without_a_match_is_refused_with_the_closest_names(patterns, said):
    with pytest.raises(UserError) as error:
        select(NAMES, patterns, "model.freeze")
    for words in said:
        assert words in str(error.value)


def test_names_are_written_by_the_parts_that_they_make_up():
    assert collapsed(["head.weight", "head.bias"], NAMES) == ["head"]
    assert collapsed(["backbone.embed.weight", "head.bias"], NAMES) == ["backbone.embed.weight", "head.bias"]
    assert collapsed([name for name in NAMES if ".mlp.3." in name], NAMES)[:2] == [
        "backbone.encoder.blocks.0.mlp.3",
        "backbone.encoder.blocks.1.mlp.3",
    ]
    assert collapsed(NAMES, NAMES) == ["backbone", "head"]
