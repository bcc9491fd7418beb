"""Recipes match the published numbers; every refusal is one clear sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from fastmoco.config import (
    Config,
    ConfigError,
    check,
    dump,
    flatten,
    load,
    parse,
    parse_text,
    warnings,
)
from fastmoco.config.fields import OptimConfig
from fastmoco.config.parsing import validated
from fastmoco.machine import ranks

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def recipe(name: str, *overrides: str) -> Config:
    return parse(["--config", str(CONFIGS / f"{name}.yaml"), *overrides])


# The recipe table of the papers and the official code, restated independently of the YAML files.
PUBLISHED = {
    "moco_v1_r50_200ep": {
        **{"optim.epochs": 200, "optim.schedule": "step", "optim.milestones": (120, 160)},
        **{"moco.temperature": 0.07, "model.head": "linear"},
        **{"augment.recipe": "v1", "augment.jitter_p": 1.0, "augment.hue": 0.4},
        **{"augment.blur_p": 0.0},
    },
    "moco_v2_r50_200ep": {
        **{"optim.epochs": 200, "optim.schedule": "cosine", "moco.temperature": 0.2},
        **{"model.head": "mlp", "augment.recipe": "v2", "augment.jitter_p": 0.8},
        **{"augment.hue": 0.1, "augment.blur_p": 0.5, "augment.blur_min": 0.1},
        **{"augment.blur_max": 2.0},
    },
}
PUBLISHED["moco_v2_r50_800ep"] = {**PUBLISHED["moco_v2_r50_200ep"], "optim.epochs": 800}
BOTH = {
    **{"model.arch": "resnet50", "model.dim": 128, "moco.queue_size": 65536},
    **{"moco.momentum": 0.999, "optim.global_batch_size": 256, "optim.lr": 0.03},
    **{"optim.momentum": 0.9, "optim.weight_decay": 1e-4, "optim.lr_scaling": "none"},
    **{"augment.image_size": 224, "augment.min_area": 0.2, "augment.brightness": 0.4},
    **{"augment.contrast": 0.4, "augment.saturation": 0.4, "augment.grayscale_p": 0.2},
    **{"augment.flip_p": 0.5, "moco.bn_group_size": 32},
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_recipes_are_the_published_ones(name: str) -> None:
    values = flatten(recipe(name))
    assert {key: values[key] for key in BOTH} == BOTH
    assert {key: values[key] for key in PUBLISHED[name]} == PUBLISHED[name]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_passes_its_checks(path: Path) -> None:
    check(parse(["--config", str(path)]), world_size=1)


# Training images of each set that a recipe is for, as its publishers count them.
IMAGES = {
    **{"cifar10_r18": 50_000, "cifar100_r18": 50_000, "stl10_r18": 105_000},
    **{"imagenette_r18": 9_469, "tiny_imagenet_r18": 100_000, "imagenet100_r18": 126_689},
    **dict.fromkeys(("moco_v2_r50_b1024", "moco_v2_r50_b4096"), 1_281_167),
}


@pytest.mark.parametrize("name", sorted(IMAGES))
def test_recipes_for_a_known_set_warn_of_nothing_and_have_enough_steps(name: str) -> None:
    """A queue of at most half the set, BN groups that hide the key, and key encoders that move."""
    config, ranks = recipe(name), 16 if "_b" in name else 1
    check(config, ranks)
    assert warnings(config, ranks, IMAGES[name]) == []
    steps = IMAGES[name] // config.optim.global_batch_size
    assert 1 / (1 - config.moco.momentum) < 3 * steps  # behind by less than three epochs
    assert steps * config.optim.epochs > 20_000


@pytest.mark.parametrize(("batch", "lr"), [(1024, 1.2), (4096, 4.8)])
def test_large_batches_have_what_they_fail_without(batch: int, lr: float) -> None:
    config = recipe(f"moco_v2_r50_b{batch}")
    assert (config.optim.name, config.optim.warmup_epochs) == ("lars", 10)
    assert config.resolved_lr() == pytest.approx(lr)
    published = recipe("moco_v2_r50_200ep")
    assert config.augment == published.augment
    age = published.moco.momentum ** (batch / published.optim.global_batch_size)
    assert config.moco.momentum == pytest.approx(age, abs=5e-4)


def test_no_arguments_mean_the_demo() -> None:
    assert parse([]) == recipe("demo")


def test_overrides_win_over_the_file_and_numbers_are_numbers(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optim: {lr: 1e-4, milestones: [1, 2]}\nmoco: {temperature: 0.5}\n")
    config = parse(["--config", str(file), "--moco.temperature", "0.1"])
    assert config.optim.lr == 1e-4
    assert config.optim.milestones == (1, 2)
    assert config.moco.temperature == 0.1


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    config = recipe("moco_v1_r50_200ep", "--optim.lr", "0.0123")
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


def test_removed_fields_load_where_they_had_their_default(tmp_path: Path) -> None:
    """Files of older versions name every field."""
    config = recipe("cifar10_r18")
    old = dump(config).replace("  k: 200", "  k: 200\n  temperature: 0.07\n  batch_size: 256")
    old = old.replace("  milestones:", "  gamma: 0.1\n  milestones:")
    assert "batch_size: 256" in old
    assert "gamma: 0.1" in old
    (tmp_path / "config.yaml").write_text(old)
    assert load(tmp_path / "config.yaml") == parse_text(old) == config
    (tmp_path / "config.yaml").write_text(old.replace("temperature: 0.07", "temperature: 0.5"))
    with pytest.raises(ConfigError, match="temperature"):
        load(tmp_path / "config.yaml")
    (tmp_path / "config.yaml").write_text(old.replace("gamma: 0.1", "gamma: 0.2"))
    with pytest.raises(ConfigError, match="gamma"):
        load(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="temperature"):
        parse(["--knn.temperature", "0.07"])  # only a file may be old


def choices_with_on_and_off() -> list[str]:
    groups = {group: type(value) for group, value in vars(Config()).items()}
    return [
        f"{group}.{name}"
        for group, of in groups.items()
        for name, kind in get_type_hints(of).items()
        if {"on", "off"} <= set(get_args(kind))
    ]


def test_there_are_choices_with_on_and_off() -> None:
    assert "run.compile" in choices_with_on_and_off()


@pytest.mark.parametrize("option", choices_with_on_and_off())
@pytest.mark.parametrize("word", ["on", "off"])
def test_on_and_off_in_a_file_are_choices_and_not_booleans(
    option: str, word: str, tmp_path: Path
) -> None:
    group, name = option.split(".")
    file = tmp_path / "mine.yaml"
    for text in (f"{group}: {{{name}: {word}}}", f"{group}:\n  {name}: '{word}'\n"):
        file.write_text(text)
        config = load(file)
        assert flatten(config)[option] == word
        file.write_text(dump(config))
        assert load(file) == parse_text(dump(config)) == config
    assert flatten(parse([f"--{group}={{{name}: {word}}}"]))[option] == word


@pytest.mark.parametrize("word", ["yes", "no", "true", "On"])
def test_other_words_for_on_and_off_are_refused_as_they_were_written(
    word: str, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"run: {{compile: {word}}}")
    with pytest.raises(ConfigError) as error:
        load(file)
    assert str(error.value).startswith('Parser key "run.compile"')
    assert "'auto', 'on', 'off'" in str(error.value)
    assert str(error.value).endswith(word)


def test_booleans_in_a_file_are_still_booleans_and_words_are_words(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    for words, meant in ((("true", "True", "on", "yes"), True), (("false", "OFF", "no"), False)):
        for word in words:
            file.write_text(f"moco: {{symmetric: {word}}}\ndata: {{verify: {word}}}\n")
            assert load(file).moco.symmetric is load(file).data.verify is meant
    file.write_text("moco: {symmetric: maybe}")
    with pytest.raises(ConfigError, match=r"moco\.symmetric.*bool.*maybe"):
        load(file)
    file.write_text("run: {dir: 2026-11-22}\ndata: {root: off}\n")
    assert (load(file).run.dir, load(file).data.root) == ("2026-11-22", "off")


@pytest.mark.parametrize(
    ("arguments", "mentions"),
    [
        (["--moco.temprature", "0.1"], ["moco.temprature"]),
        (["--moco.temp", "0.1"], ["moco.temp"]),  # no abbreviations
        (["--optim.epochs", "ten"], ["optim.epochs", "ten"]),
        (["--model.arch", "resnet51"], ["model.arch", "resnet51"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
    ],
)
def test_unknown_keys_and_wrong_types(arguments: list[str], mentions: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        parse(arguments)
    assert all(word in str(error.value) for word in mentions)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("last", ["run: *a7", "data: {root: *a7}", "circle: &c [*c, 1]"])
def test_a_file_whose_aliases_stand_for_millions_of_words_is_refused(
    tmp_path: Path, last: str
) -> None:
    lines = ["a0: &a0 [w]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 8)]
    text = "\n".join([*lines, last])
    (tmp_path / "bomb.yaml").write_text(text)
    with pytest.raises(ConfigError, match="aliases stand for more"):
        load(tmp_path / "bomb.yaml")
    with pytest.raises(yaml.YAMLError, match="aliases stand for more"):
        parse_text(text)


def test_aliases_of_a_few_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "short.yaml"
    path.write_text("run: &run {seed: 3}\nmodel: {dim: &dim 64}\nmoco: {queue_size: *dim}\n")
    assert load(path).moco.queue_size == 64


@pytest.mark.parametrize("name", [*(f.name for f in fields(Config)), *flatten(Config())])
def test_a_field_or_group_without_a_value_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    group, _, field = name.partition(".")
    path = tmp_path / "mine.yaml"
    lacks = "has no value: write one" if field else "holds no fields: write some"
    for nothing in ("", "~", "null") if field else ("", "~", "null", "[]", "5"):
        path.write_text(f"{group}:\n  {field}: {nothing}\n" if field else f"{group}: {nothing}\n")
        with pytest.raises(ConfigError) as caught:
            parse(["--config", str(path)])
        assert str(caught.value) == f"{path}: {name} {lacks}, or leave {name} out."


def test_what_is_empty_in_a_file_may_be_given_as_an_option(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data:\n  root:\n")
    assert parse(["--config", str(tmp_path / "mine.yaml"), "--data.root=x"]).data.root == "x"


@pytest.mark.parametrize("text", ["", "null", "# lr: 1", "5", "words", "- a", "[]"])
def test_a_file_that_is_no_configuration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    for option in (["--config", f"{tmp_path}/mine.yaml"], [f"--config={tmp_path}/mine.yaml"]):
        with pytest.raises(ConfigError) as caught:
            parse(option)
        assert str(caught.value).startswith(f"{tmp_path}/mine.yaml holds no fields with values")


def test_a_configuration_from_python_or_a_checkpoint_has_all_values() -> None:
    nothing: Any = None
    reads: list[Callable[[], Config]] = [
        lambda: parse_text("optim: {lr: }"),
        lambda: validated(replace(Config(), optim=OptimConfig(lr=nothing))),
        lambda: parse(["--optim={lr: }"]),
    ]
    for read in reads:
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value) == "optim.lr has no value: write one, or leave optim.lr out."


def test_unknown_key_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "typo.yaml"
    file.write_text("optim: {lerning_rate: 0.1}\n")
    with pytest.raises(ConfigError, match="lerning_rate"):
        parse(["--config", str(file)])


MEMORY_BANK = ["--moco.mechanism", "memory_bank", "--optim.name", "sgd"]
END_TO_END = ["--moco.mechanism", "end_to_end", "--optim.name", "sgd"]


@pytest.mark.parametrize(
    ("overrides", "world", "mentions"),
    [
        (["--optim.global_batch_size", "250"], 8, ["global_batch_size 250", "8 ranks"]),
        (["--optim.accumulate", "3"], 1, ["accumulate 3"]),
        (["--moco.bn_group_size", "30"], 1, ["bn_group_size 30", "256"]),
        (["--moco.queue_size", "128"], 1, ["queue_size 128", "at least 256"]),
        (["--moco.queue_size", "300", "--moco.symmetric", "true"], 1, ["at least 512"]),
        (["--moco.temperature", "0"], 1, ["temperature"]),
        (["--moco.temperature", ".nan"], 1, ["moco.temperature is nan", "finite"]),
        (["--moco.temperature", ".inf"], 1, ["moco.temperature is inf", "finite"]),
        (["--optim.lr", ".inf"], 1, ["optim.lr is inf", "finite"]),
        (["--optim.weight_decay", ".inf"], 1, ["optim.weight_decay is inf", "finite"]),
        (["--run.checkpoint_minutes", ".inf"], 1, ["run.checkpoint_minutes is inf", "finite"]),
        (["--data.intensity", "[0, .inf]"], 1, ["data.intensity is [0.0, inf]", "finite"]),
        (["--moco.momentum", "1.5"], 1, ["moco.momentum is 1.5"]),
        (["--optim.warmup_epochs", "200"], 1, ["warmup_epochs 200", "epochs 200"]),
        (["--optim.milestones", "[160, 120]"], 1, ["optim.milestones is [160, 120]", "later"]),
        (["--optim.milestones", "[-5]"], 1, ["optim.milestones is [-5]", "after the first"]),
        (["--augment.blur_min", "3"], 1, ["blur_min 3.0", "blur_max 2.0"]),
        (["--augment.image_size", "24"], 1, ["image_size 24", "at least 32"]),
        (["--augment.hue", "0.6"], 1, ["augment.hue is 0.6"]),
        (["--optim.global_batch_size", "8"], 8, ["BN group of 1"]),
        (["--moco.symmetric", "true", "--moco.shuffle_bn", "loader"], 1, ["shuffle_bn to auto"]),
        (["--moco.mechanism", "end_to_end"], 1, ["one encoder", "optim.name to sgd"]),
        (
            [*END_TO_END, "--optim.accumulate", "2"],
            *(1, ["accumulate 2", "end_to_end", "accumulate to 1"]),
        ),
        ([*MEMORY_BANK, "--data.source", "synthetic"], 1, ["memory_bank", "another data.source"]),
        ([*MEMORY_BANK, "--moco.symmetric", "true"], 1, ["symmetric true has nothing to do"]),
        ([*MEMORY_BANK, "--moco.shuffle_bn", "split"], 1, ["moco.shuffle_bn has nothing to do"]),
        (["--moco.mechanism", "memory_bank"], 1, ["one encoder", "optim.name to sgd"]),
    ],
)
def test_cross_field_checks(overrides: list[str], world: int, mentions: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check(recipe("moco_v2_r50_200ep", *overrides), world)
    assert all(words in str(error.value) for words in mentions), str(error.value)


def test_warnings_name_an_oversized_queue_and_a_useless_shuffle() -> None:
    config = recipe("moco_v2_r50_200ep")
    assert warnings(config, 8, 1_281_167) == []
    (queue,) = warnings(config, 8, 5000)
    assert "65536 exceeds half of the 5000" in queue
    assert len(warnings(config, 8, 2 * 65536 - 1)) == 1
    assert warnings(config, 8, 2 * 65536) == []
    # The batch is the dictionary: it may be larger than the queue, which is not there.
    small = recipe("moco_v2_r50_200ep", *END_TO_END, "--moco.queue_size", "8")
    check(small, 8)
    assert warnings(small, 8, 12) == []
    alone = recipe("moco_v2_r50_200ep", "--moco.bn_group_size", "0")
    (shuffle,) = warnings(alone, 1, 1_281_167)
    assert "BN group" in shuffle
    halves = recipe("moco_v2_r50_200ep", "--moco.bn_group_size", "128")
    (leak,) = warnings(halves, 1, 1_281_167)
    assert "2 BN groups" in leak
    assert warnings(alone, 8, 1_281_167) == []  # all_to_all leaves the rank's group


def test_identity_ignores_where_and_how_fast() -> None:
    config = recipe("demo")
    elsewhere = replace(config, run=replace(config.run, dir="x", log_every=7, device="cpu"))
    limits = replace(config, data=replace(config.data, max_bad_share=0.5, verify=True))
    hotter = replace(config, moco=replace(config.moco, temperature=0.9))
    assert limits.identity() == elsewhere.identity() == config.identity()
    assert hotter.identity() != config.identity()


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1.0, 1e300])
def test_a_time_that_is_none_is_a_sentence_before_ranks_meet(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"^run\.timeout_s is .*, but must be finite"):
        ranks.start("cpu", seconds)
