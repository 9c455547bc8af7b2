"""Recipes: read, checked, written, hashed, and resolved for one tensor."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import DTYPES, Filtered, Recipe, resolve
from evomerge.signatures import METHODS

NAMES = ["models/a", "org/b@v1", "/c d", "日本", "2024", "base+adapters/x@r"]
CALIBRATION = "texts/日本 1.jsonl"
FILTERS = ["self_attn", "mlp", "layers.1.", "norm", "*", ""]
Tree = dict[str, Any]


def _scalars(default: Any, name: str) -> st.SearchStrategy[Any]:
    if isinstance(default, bool):
        return st.booleans()
    if name in ("density", "gamma", "select_topk"):
        return st.floats(0.01, 0.99)
    if name == "max_iter":
        return st.integers(1, 20)
    return st.floats(-1e6, 1e6) | st.integers(-3, 3)


def _values(default: Any, name: str) -> st.SearchStrategy[Any]:
    scalars = _scalars(default, name)
    plain = scalars | st.lists(scalars, min_size=1, max_size=3)
    filters = {"filter": st.sampled_from(FILTERS)}
    entry = st.fixed_dictionaries({"value": plain}, optional=filters)
    return plain | st.lists(entry, min_size=1, max_size=3)


def _parameters(*known: Mapping[str, Any]) -> st.SearchStrategy[Tree]:
    values = {name: _values(default, name) for each in known for name, default in each.items()}
    return st.fixed_dictionaries({}, optional=values)


@st.composite
def bodies(draw: st.DrawFn, method: str) -> Tree:
    """Plain data of `models` or `slices`."""
    signature = METHODS[method]
    beside = {"parameters": _parameters(signature.per_model)}
    wide = {"parameters": _parameters(signature.per_model, signature.shared)}
    name = st.sampled_from(NAMES)
    if draw(st.booleans()):
        entry = st.fixed_dictionaries({"model": name}, optional=beside)
        return {"models": draw(st.lists(entry, min_size=1, max_size=3, unique_by=_model))}
    slices = []
    for length in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
        ranges = st.integers(0, 9).map(lambda start, n=length: [start, start + n])
        source = st.fixed_dictionaries({"model": name, "layer_range": ranges}, optional=beside)
        sources = st.lists(source, min_size=1, max_size=2, unique_by=_model)
        extra = {**wide, "base_model": name}
        slices.append(draw(st.fixed_dictionaries({"sources": sources}, optional=extra)))
    return {"slices": slices}


def _model(entry: Tree) -> str:
    name: str = entry["model"]
    return name


@st.composite
def tokenizers(draw: st.DrawFn, named: Sequence[str]) -> Tree:
    """Plain data of what a recipe may say about the tokenizer."""
    name = st.sampled_from(named)
    if draw(st.booleans()):
        return {"tokenizer_source": draw(name | st.sampled_from([f"model:{named[0]}", "union"]))}
    number = {"kind": st.just("model_token"), "model": name, "token_id": st.integers(0, 9)}
    text = {**number, "token": st.text()}
    del text["token_id"]
    rows = name | st.just({"kind": "zero"}) | st.fixed_dictionaries(number)
    rows |= st.fixed_dictionaries(text)
    rule = st.fixed_dictionaries({"source": rows}, optional={"force": st.booleans()})
    settings_ = {
        "source": name | st.sampled_from(["base", "union"]),
        "pad_to_multiple_of": st.integers(1, 64),
        "tokens": st.dictionaries(st.sampled_from(["<s>", "a", "日"]), rule | st.just({})),
    }
    return {"tokenizer": draw(st.fixed_dictionaries({}, optional=settings_))}


@st.composite
def recipes(draw: st.DrawFn) -> Tree:
    """Plain data of any valid recipe: models, slices or modules, scalars, gradients, filters."""
    method = draw(st.sampled_from(sorted(METHODS)))
    parameters = _parameters(METHODS[method].per_model, METHODS[method].shared)
    tree: Tree = {"merge_method": method}
    if draw(st.integers(0, 3)):
        tree |= draw(bodies(method))
    else:
        parts = draw(st.dictionaries(st.sampled_from(["text_decoder", "encoder"]), bodies(method)))
        tree["modules"] = parts or {"default": draw(bodies(method))}
        for part in tree["modules"].values():
            part |= draw(st.fixed_dictionaries({}, optional={"parameters": parameters}))
    if METHODS[method].base == "required" or draw(st.booleans()):
        tree["base_model"] = draw(st.sampled_from(NAMES))
        sizes = {"omega": st.floats(0, 1), "blocks": st.integers(1, 9), "tokens": st.integers(1)}
        aim = st.fixed_dictionaries({"calibration": st.just(CALIBRATION)}, optional=sizes)
        tree |= draw(st.fixed_dictionaries({}, optional={"aim": aim}))
    if draw(st.booleans()):
        tree |= draw(tokenizers(Recipe.from_dict(tree).model_names()))
    dtype = st.sampled_from(DTYPES)
    rest = {"dtype": dtype, "out_dtype": dtype, "parameters": parameters}
    rest["chat_template"] = st.sampled_from(["auto", "chatml", "{% for m in messages %}\n"])
    return tree | draw(st.fixed_dictionaries({}, optional=rest))


def hashes(tree: Tree) -> dict[str, str]:
    """A content hash for every model and file that a recipe names."""
    names = Recipe.from_dict(tree).model_names()
    found = {name: f"{NAMES.index(name):064x}" for name in names}
    return found | ({CALIBRATION: "c" * 64} if "aim" in tree else {})


def sha(tree: Tree) -> str:
    return Recipe.from_dict(tree).sha(hashes(tree))


def rebuilt(node: Any, leaf: Callable[[Any], Any], keys: Callable[[Tree], Tree] = dict) -> Any:
    """A copy of plain data with every leaf and every mapping passed through a function."""
    if isinstance(node, dict):
        return keys({k: rebuilt(v, leaf, keys) for k, v in node.items()})
    if isinstance(node, list):
        return [rebuilt(v, leaf, keys) for v in node]
    return leaf(node)


def numbers(node: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every number and flag inside parameters."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from numbers(value, (*where, key))
        elif isinstance(value, int | float) and "parameters" in where:
            yield (*where, key)


@pytest.mark.slow
@settings(max_examples=100, derandomize=True, deadline=None)
@given(recipes())
def test_a_recipe_survives_writing_and_reading(tree: Tree) -> None:
    recipe = Recipe.from_dict(tree)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.slow
@settings(max_examples=50, derandomize=True, deadline=None)
@given(recipes())
def test_writing_adds_nothing_that_was_not_given(tree: Tree) -> None:
    def without_empty(node: Tree) -> Tree:
        return {k: v for k, v in node.items() if k != "parameters" or v != {}}

    written = yaml.safe_load(Recipe.from_dict(tree).to_yaml())
    assert written == rebuilt(tree, lambda leaf: leaf, without_empty)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(recipes())
def test_the_hash_ignores_key_order(tree: Tree) -> None:
    turned = rebuilt(tree, lambda leaf: leaf, lambda node: dict(reversed(node.items())))
    assert sha(turned) == sha(tree)


@pytest.mark.slow
@settings(max_examples=50, derandomize=True, deadline=None)
@given(recipes())
def test_the_hash_ignores_how_a_number_is_spelt(tree: Tree) -> None:
    other = copy.deepcopy(tree)
    for *path, last in numbers(tree):
        node: Any = other
        for step in path:
            node = node[step]
        if not isinstance(node[last], bool):
            node[last] = -0.0 if node[last] == 0 else float(node[last])
    assert sha(other) == sha(tree)


@pytest.mark.slow
@settings(max_examples=50, derandomize=True, deadline=None)
@given(recipes())
def test_the_hash_ignores_empty_parts(tree: Tree) -> None:
    def padded(node: Tree) -> Tree:
        of_model = "model" in node and node.keys() <= {"model", "layer_range", "parameters"}
        if of_model or {"models", "slices", "sources"} & node.keys():
            node.setdefault("parameters", {})
        if "value" in node:
            node.setdefault("filter", None)
        if "merge_method" in node:
            none = ("dtype", "models", "slices", "modules", "tokenizer", "aim", "chat_template")
            node = {**dict.fromkeys(none), **node}
        return node

    assert sha(rebuilt(tree, lambda leaf: leaf, padded)) == sha(tree)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(recipes())
def test_the_hash_ignores_where_a_model_lies(tree: Tree) -> None:
    moved = {name: f"/elsewhere/{i}" for i, name in enumerate([*NAMES, CALIBRATION])}
    content = hashes(tree)
    there = {moved[name]: digest for name, digest in content.items()}

    def renamed(node: Tree) -> Tree:
        keys = ("model", "base_model", "tokenizer_source", "source", "calibration")
        return {
            k: moved.get(v.removeprefix("model:"), v) if k in keys and isinstance(v, str) else v
            for k, v in node.items()
        }

    elsewhere = Recipe.from_dict(rebuilt(tree, lambda leaf: leaf, renamed))
    assert elsewhere.sha(there) == sha(tree)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(recipes(), st.data())
def test_the_hash_changes_with_any_model_content(tree: Tree, data: st.DataObject) -> None:
    content = hashes(tree)
    name = data.draw(st.sampled_from(sorted(content)))
    assert Recipe.from_dict(tree).sha({**content, name: "f" * 64}) != sha(tree)


@pytest.mark.slow
@settings(max_examples=100, derandomize=True, deadline=None)
@given(recipes().filter(lambda tree: any(numbers(tree))), st.data())
def test_the_hash_changes_with_any_value(tree: Tree, data: st.DataObject) -> None:
    changed = copy.deepcopy(tree)
    *path, last = data.draw(st.sampled_from(list(numbers(tree))))
    node: Any = changed
    for step in path:
        node = node[step]
    old = node[last]
    if "max_iter" in (*path, last):
        node[last] = old + 1
    else:
        node[last] = not old if isinstance(old, bool) else old / 2 if old else 0.5
    if node[last] != old:  # half of the smallest number is itself
        assert sha(changed) != sha(tree)


@pytest.mark.parametrize(
    "change",
    [
        {"merge_method": "dare_linear"},
        {"dtype": "float16"},
        {"out_dtype": "float32"},
        {"base_model": "org/b@v1"},
        {"tokenizer_source": "models/a"},
        {"models": [{"model": "org/b@v1"}, {"model": "models/a"}]},
        {"parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
        {"parameters": {"weight": [1, 1]}},
    ],
    ids=lambda change: ",".join(change),
)
def test_the_hash_changes_with_any_part(change: Tree) -> None:
    tree = {
        "merge_method": "ties",
        "models": [{"model": "models/a"}, {"model": "org/b@v1"}],
        "base_model": "models/a",
        "parameters": {"weight": [{"filter": "attn", "value": 1}]},
    }
    assert sha({**tree, **change}) != sha(tree)


def test_the_hash_of_a_stored_candidate_stays_what_it_is() -> None:
    tree = {
        "merge_method": "linear",
        "models": [{"model": "models/a", "parameters": {"weight": 1}}, {"model": "org/b@v1"}],
        "parameters": {"weight": [{"filter": "mlp", "value": [0.25, 0.5]}, {"value": 2}]},
    }
    assert sha(tree) == "0fa5db698b97131f3f2dde984bf82dc03312598dcfd3265ffe41a701f1da9712"


def test_a_model_without_a_content_hash_has_no_recipe_hash() -> None:
    recipe = Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": "a"}]})
    with pytest.raises(RecipeError, match="model 'a' has no content hash"):
        recipe.sha({"b": "0" * 64})


def test_model_names_come_once_with_the_base_last() -> None:
    tree = {
        "merge_method": "ties",
        "base_model": "base",
        "slices": [
            {"sources": [{"model": "b", "layer_range": [0, 1]}], "base_model": "c"},
            {"sources": [{"model": m, "layer_range": [1, 2]} for m in ("a", "b")]},
        ],
    }
    assert Recipe.from_dict(tree).model_names() == ("b", "c", "a", "base")


@pytest.mark.parametrize(("source", "same"), [("model:a", True), ("b", False), ("base", False)])
def test_the_hash_knows_a_tokenizer_source_by_its_content(source: str, same: bool) -> None:
    tree = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}]}
    content = {"a": "1" * 64, "b": "2" * 64}
    of_a, of_source = (
        Recipe.from_dict({**tree, "tokenizer_source": name}).sha(content) for name in ("a", source)
    )
    assert (of_a == of_source) == same


def test_numbers_in_a_list_and_filters_are_written_on_one_line() -> None:
    weight = [{"filter": "mlp", "value": [0.25, 1]}, {"value": 0.5}]
    tree = {"merge_method": "linear", "models": [{"model": "a"}], "parameters": {"weight": weight}}
    text = Recipe.from_dict(tree).to_yaml()
    assert "- {filter: mlp, value: [0.25, 1]}\n" in text
    assert "- {value: 0.5}\n" in text


def test_a_recipe_cannot_be_changed_behind_its_hash() -> None:
    recipe = Recipe.from_dict({"merge_method": "passthrough", "models": [{"model": "a"}]})
    with pytest.raises(ValueError, match="frozen"):
        recipe.base_model = "b"


MODELS = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]
LINEAR: Tree = {"merge_method": "linear", "models": MODELS}
TIES: Tree = {"merge_method": "ties", "models": MODELS, "base_model": "base"}
FORMS = "give a number, a list of numbers or a list of {filter, value} entries"


def stack(*sources: Tree, **rest: Any) -> Tree:
    return {"merge_method": "linear", "slices": [{"sources": list(sources)}], **rest}


def piece(start: Any, end: Any, model: str = "a") -> Tree:
    return {"model": model, "layer_range": [start, end]}


def modules(**parts: Any) -> Tree:
    return {"merge_method": "linear", "modules": parts}


def token(rule: Tree) -> Tree:
    return {**LINEAR, "tokenizer": {"tokens": {"<s>": rule}}}


def aim(**keys: Any) -> Tree:
    return {**TIES, "aim": keys}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({**LINEAR, "merge_method": "tis"}, "merge_method: 'tis' is unknown: did you mean 'ties'?"),
        ({"models": MODELS}, "merge_method: required, and missing"),
        ({**LINEAR, "base_modl": "x"}, "base_modl: unknown key: did you mean 'base_model'?"),
        (
            {**LINEAR, "models": [{"modl": "a"}]},
            "models[0].modl: unknown key: did you mean 'model'",
        ),
        ({**LINEAR, "models": [{"parameters": {}}]}, "models[0].model: required, and missing"),
        ({**LINEAR, "const_tag": 1}, "const_tag: unknown key: known: aim, base_model, chat_"),
        (
            {**LINEAR, "pad_to_multiple_of": 8},
            "pad_to_multiple_of: unknown key: it belongs to 'tok",
        ),
        (
            {**LINEAR, "models": [{"model": "a", "layer_range": [0, 2]}]},
            "models[0].layer_range: unknown key: it belongs to 'slices.sources'",
        ),
        (
            {**LINEAR, "models": [*MODELS, {"model": "a"}]},
            "models[2].model: 'a' is listed twice: give it once, with the sum of its weights",
        ),
        *(
            ({**LINEAR, "models": [{"model": m}]}, f"models[0].model: {m!r} names no model: give")
            for m in (
                3,
                {"model": 3},
                {"model": {"path": "a", "revison": "x"}},
                {"model": "a", "override_architecture": "Llama"},
            )
        ),
        ({**LINEAR, "models": []}, "models: the list is empty: name at least one model"),
        ({**LINEAR, "models": "a"}, "models: 'a': give a list"),
        ({**LINEAR, "models": ["a"]}, "models[0]: 'a': give keys and their values"),
        ({**LINEAR, "slices": []}, "give one of 'models', 'slices' and 'modules', and only one"),
        ({"merge_method": "linear"}, "give one of 'models', 'slices' and 'modules', and only one"),
        ({**LINEAR, "dtype": "float33"}, "dtype: 'float33' is unknown: did you mean 'float32'?"),
        ({**LINEAR, "out_dtype": "x"}, "out_dtype: 'x' is unknown: known: bfloat16, float16"),
        ({**LINEAR, "dtype": "int64"}, "dtype: 'int64' is unknown: known: bfloat16, float16"),
        ({**TIES, "base_model": None}, "base_model is missing: 'ties' needs it"),
        (
            {**LINEAR, "parameters": {"wieght": 1}},
            "parameters.wieght: 'linear' has no such parameter: did you mean 'weight'?",
        ),
        (
            {**LINEAR, "models": [{"model": "a", "parameters": {"density": 1}}]},
            "models[0].parameters.density: 'linear' has no such parameter: known: normalize,",
        ),
        (
            stack({**piece(0, 1), "parameters": {"t": 1}}),
            "slices[0].sources[0].parameters.t: 'linear' has no such parameter",
        ),
        *(
            ({**TIES, "parameters": {"density": d}}, f"parameters.density: {n} is outside (0, 1]")
            for d, n in [(0, 0), (-0.1, -0.1), (1.01, 1.01), ([0.5, 2], 2)]
        ),
        *(
            ({**TIES, "merge_method": m, "parameters": {p: x}}, f"parameters.{p}: {x} is outside ")
            for m, p, x in [
                ("sce", "select_topk", 0),
                ("sce", "select_topk", 1.5),
                ("breadcrumbs", "gamma", 1),
                ("breadcrumbs", "gamma", -0.1),
            ]
        ),
        *(
            (
                {"merge_method": "karcher", "models": MODELS[1:], "parameters": {"max_iter": n}},
                f"parameters.max_iter: {n} is outside 1, 2, 3",
            )
            for n in (0, 2.5)
        ),
        *(
            ({**LINEAR, "parameters": {"weight": w}}, f"parameters.weight: {n} is not a finite")
            for w, n in [
                (float("nan"), "nan"),
                ([1, float("inf")], "inf"),
                ([{"filter": "x", "value": [-float("inf")]}], "-inf"),
                (True, "True"),
            ]
        ),
        *(
            ({**LINEAR, "parameters": {"weight": w}}, f"parameters.weight: {w!r}: {FORMS}")
            for w in (
                "abc",
                None,
                [],
                [1, "x"],
                {"vlue": 1},
                [{"filter": "a", "value": "x"}],
                [{"filter": "a", "value": []}],
                [{"filter": "a", "vlue": 1}],
                [{"filter": "a", "value": 1}, 2],
            )
        ),
        ({**TIES, "parameters": {"normalize": 3}}, "parameters.normalize: 3 is not a truth value"),
        ({**TIES, "parameters": {"normalize": [0, 1]}}, "parameters.normalize: 0 is not a truth"),
        (
            {**TIES, "models": [{"model": "a", "parameters": {"normalize": True}}]},
            "models[0].parameters.normalize: holds for all models of a merge: move it to the",
        ),
        ({**LINEAR, "parameters": 3}, "parameters: 3: give keys and their values"),
        ({"merge_method": "linear", "slices": []}, "slices: the list is empty"),
        (stack(), "slices[0].sources: the list is empty: give at least one source"),
        *(
            (stack(piece(a, b)), f"slices[0].sources[0].layer_range: [{a}, {b}] holds no layer")
            for a, b in [(2, 2), (3, 2), (-1, 2)]
        ),
        (stack(piece(0, "x")), "slices[0].sources[0].layer_range[1]: 'x'"),
        (stack({"model": "a"}), "slices[0].sources[0].layer_range: required, and missing"),
        (
            stack(piece(0, 2), {**piece(0, 3), "model": "b"}),
            "slices[0].sources: ranges of [2, 3] layers",
        ),
        (stack(piece(0, 2), piece(1, 3)), "slices[0].sources[1].model: 'a' is listed twice"),
        (
            {"merge_method": "linear", "slices": [{"sources": [], "residual_weight": 1}]},
            "slices[0].residual_weight: unknown key: mergekit reads and never applies it: leave",
        ),
        (
            {"merge_method": "linear", "slices": [{"sources": [], "merge_method": "ties"}]},
            "slices[0].merge_method: unknown key: it belongs to the top level",
        ),
        (modules(), "modules: the mapping is empty: name at least one part"),
        (modules(text={}), "modules.text: give either 'models' or 'slices'"),
        (modules(text={"models": MODELS, "slices": []}), "modules.text: give either 'models' or"),
        (modules(text={"models": []}), "modules.text.models: the list is empty"),
        (
            modules(text={"modles": MODELS}),
            "modules.text.modles: unknown key: did you mean 'models",
        ),
        (
            modules(text={"models": MODELS, "base_model": "a"}),
            "modules.text.base_model: unknown key: it belongs to the top level",
        ),
        (
            modules(text={"slices": [{"sources": [piece(2, 2)]}]}),
            "modules.text.slices[0].sources[0].layer_range: [2, 2] holds no layer",
        ),
        (
            modules(text={"models": MODELS, "parameters": {"t": 1}}),
            "modules.text.parameters.t: 'linear' has no such parameter",
        ),
        (
            {**LINEAR, "tokenizer": {"source": "a"}, "tokenizer_source": "base"},
            "give either 'tokenizer_source' or 'tokenizer', not both",
        ),
        ({**LINEAR, "tokenizer": "union"}, "tokenizer: 'union': give keys and their values"),
        ({**LINEAR, "tokenizer": {"sorce": "a"}}, "tokenizer.sorce: unknown key: did you mean 'so"),
        (
            {**LINEAR, "tokenizer": {"pad_to_multiple_of": 0}},
            "tokenizer.pad_to_multiple_of: 0: input should be greater than or equal to 1",
        ),
        (token({"force": True}), "tokenizer.tokens.<s>.force: true needs a source"),
        *(
            (
                token({"source": row}),
                f"tokenizer.tokens.<s>.source: {row!r}: give a model, {{kind: ",
            )
            for row in (
                3,
                {"kind": "zer"},
                {"kind": "zero", "model": "a"},
                {"kind": "model_token", "model": "a"},
                {"kind": "model_token", "model": "a", "token": "b", "token_id": 3},
                {"kind": "model_token", "model": "a", "token_id": -1},
            )
        ),
        (aim(), "aim.calibration: required, and missing"),
        (aim(calibration="x", block=2), "aim.block: unknown key: did you mean 'blocks'?"),
        (aim(calibration="x", blocks=0), "aim.blocks: 0: input should be greater than or equal"),
        (
            aim(calibration="x", omega=1.5),
            "aim.omega: 1.5: input should be less than or equal to 1",
        ),
        (aim(calibration="x", omega=float("nan")), "aim.omega: nan: input should be"),
        ({**LINEAR, "aim": {"calibration": "x"}}, "base_model is missing: 'aim' needs it"),
        ({1: 2}, "required, and missing"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line_by_key_value_and_remedy(
    tree: Tree, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(tree, "my.yaml")
    assert str(caught.value).startswith("my.yaml: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "my.yaml: not YAML: "),
        ("a: b: c\n  d", "my.yaml: not YAML: "),
        ("a: 2026-02-30", "my.yaml: not YAML: "),
        ("", "my.yaml: not a recipe: expected keys such as 'merge_method'"),
        ("- a", "my.yaml: not a recipe"),
        ("text", "my.yaml: not a recipe"),
    ],
)
def test_a_text_that_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text, "my.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [None, b"merge_method: \xff"])
def test_a_recipe_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "r.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_file(path)
    assert str(caught.value).startswith(f"recipe '{path}' cannot be read: ")


def test_a_recipe_file_is_named_in_complaints_about_it(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("merge_method: linear\nmodels: []\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: models: the list is empty"):
        Recipe.from_file(path)


def test_a_base_of_every_slice_is_a_base() -> None:
    piece_ = {"sources": [piece(0, 1)], "base_model": "b"}
    assert Recipe.from_dict({"merge_method": "ties", "slices": [piece_]}).base_model is None
    with pytest.raises(RecipeError, match="base_model is missing"):
        Recipe.from_dict({"merge_method": "ties", "slices": [piece_, {"sources": [piece(1, 2)]}]})


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("a", "a"),
        ({"model": "a"}, "a"),
        ({"model": "a@r", "lora": None}, "a@r"),
        ({"model": {"path": "org/a"}, "lora": "b"}, "org/a+b"),
        (
            {"model": {"path": "a", "revision": "r"}, "lora": {"path": "b", "revision": "q"}},
            "a@r+b@q",
        ),
    ],
)
def test_a_model_has_one_name_however_it_is_written(written: Any, name: str) -> None:
    tree = {
        "merge_method": "linear",
        "slices": [{"sources": [{"model": written, "layer_range": [0, 1]}], "base_model": written}],
        "base_model": written,
        "tokenizer": {"source": written, "tokens": {"<s>": {"source": written}}},
    }
    plain = json.loads(json.dumps(tree).replace(json.dumps(written), json.dumps(name)))
    recipe = Recipe.from_dict(tree)
    assert recipe.model_names() == (name,)
    assert recipe == Recipe.from_dict(plain)
    assert recipe.to_dict() == plain


def test_a_dtype_may_be_written_as_torch_does() -> None:
    recipe = Recipe.from_dict({**LINEAR, "dtype": "torch.bfloat16", "out_dtype": "torch.float32"})
    assert (recipe.dtype, recipe.out_dtype) == ("bfloat16", "float32")


def test_one_filter_stands_for_a_list_of_one() -> None:
    alone, listed = (
        Recipe.from_dict({**LINEAR, "parameters": {"weight": weight}})
        for weight in ({"filter": "mlp", "value": "1e-3"}, [{"filter": "mlp", "value": 0.001}])
    )
    assert alone == listed


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        ({}, None),
        ({"tokenizer_source": "model:a"}, "a"),
        ({"tokenizer_source": "union"}, "union"),
        ({"tokenizer": {}}, "union"),
        ({"tokenizer": {"source": "base", "pad_to_multiple_of": 8}}, "base"),
    ],
)
def test_the_vocabulary_is_told_by_either_key(keys: Tree, source: str | None) -> None:
    vocabulary = Recipe.from_dict({**LINEAR, **keys}).vocabulary
    assert (vocabulary and vocabulary.source) == source


def test_a_token_to_add_is_no_empty_part() -> None:
    tree = {**LINEAR, "tokenizer": {"tokens": {"parameters": {}}}}
    assert Recipe.from_dict(tree).to_dict() == tree


AIM = {**TIES, "aim": {"calibration": CALIBRATION}}


def test_aim_has_the_defaults_of_the_paper() -> None:
    section = Recipe.from_dict(AIM).aim
    assert section is not None
    assert (section.omega, section.blocks, section.tokens) == (0.4, 256, 512)


def test_the_hash_knows_calibration_texts_by_their_content() -> None:
    recipe, content = Recipe.from_dict(AIM), {"a": "1", "b": "2", "base": "3"}
    assert CALIBRATION not in recipe.model_names()
    with pytest.raises(RecipeError, match=f"calibration file '{CALIBRATION}' has no content hash"):
        recipe.sha(content)
    assert recipe.sha({**content, CALIBRATION: "4"}) != recipe.sha({**content, CALIBRATION: "5"})


def test_models_of_a_recipe_are_merged_in_every_part() -> None:
    parts = Recipe.from_dict(LINEAR).parts(["text_decoder", "vision_tower"])
    assert list(parts) == ["text_decoder", "vision_tower"]
    for part in parts.values():
        assert [entry.model for entry in part.models or ()] == ["a", "b"]
        assert (part.slices, part.parameters) == (None, {})


def test_slices_of_a_recipe_are_those_of_the_only_part() -> None:
    recipe = Recipe.from_dict(stack(piece(0, 2), parameters={"weight": 1}))
    (part,) = recipe.parts(["default"]).values()
    assert (part.slices, part.models, part.parameters) == (recipe.slices, None, {})
    with pytest.raises(RecipeError, match="slices: the model has the parts encoder, decoder: say"):
        recipe.parts(["encoder", "decoder"])


def test_modules_are_found_by_name_in_the_order_of_the_model() -> None:
    one, other = {"models": MODELS}, {"models": MODELS[:1], "parameters": {"weight": 1}}
    recipe = Recipe.from_dict(modules(vision_tower=one, text_decoder=other))
    parts = recipe.parts(["text_decoder", "multi_modal_projector", "vision_tower"])
    assert list(parts) == ["text_decoder", "vision_tower"]
    assert parts["text_decoder"].parameters == {"weight": 1}
    with pytest.raises(RecipeError, match="no part 'vision_tower': did you mean 'vision_model'"):
        recipe.parts(["text_decoder", "vision_model"])


def franken(*ranges: tuple[str, int, int]) -> Recipe:
    slices = [{"sources": [piece(start, end, model)]} for model, start, end in ranges]
    return Recipe.from_dict({"merge_method": "passthrough", "slices": slices})


# Goliath 120B as its card gives it, with the last layer of each range.
GOLIATH = [
    ("xwin", 0, 16),
    ("euryale", 8, 24),
    ("xwin", 17, 32),
    ("euryale", 25, 40),
    ("xwin", 33, 48),
]


def test_layers_that_fall_out_at_joins_are_told() -> None:
    first, second = franken(*GOLIATH).skipped_layers()
    assert "'xwin' loses layers 16, 32 between its slices" in first
    assert "'euryale' loses layers 24 between its slices" in second
    assert "\n" not in first + second


@pytest.mark.parametrize(
    "ranges",
    [
        [(model, start, end + 1) for model, start, end in GOLIATH],
        [("a", 0, 24), ("a", 8, 32)],  # SOLAR
        [("a", 0, 8), ("a", 16, 24)],  # pruned on purpose
        [("a", 0, 4), ("a", 5, 8), ("b", 0, 4), ("a", 4, 5)],  # layer 4 comes later
        [("a", 0, 4), ("b", 5, 8)],
    ],
    ids=["mended", "overlap", "wide gap", "used elsewhere", "another parent"],
)
def test_layouts_that_lose_nothing_are_left_in_peace(ranges: list[tuple[str, int, int]]) -> None:
    assert franken(*ranges).skipped_layers() == ()


def test_lost_layers_are_told_in_every_module() -> None:
    slices = [{"sources": [piece(0, 2)]}, {"sources": [piece(3, 4)]}]
    (message,) = Recipe.from_dict(modules(text={"slices": slices})).skipped_layers()
    assert message.startswith("modules.text.slices: 'a' loses layers 2 ")


TENSOR = "model.layers.1.mlp.up_proj.weight"


def filtered(*entries: tuple[str | None, Any]) -> list[Filtered]:
    return [Filtered(filter=pattern, value=value) for pattern, value in entries]


@pytest.mark.parametrize(
    ("scopes", "value"),
    [
        ([{"weight": 1.0}, {"weight": 2.0}, {"weight": 3.0}], 1.0),
        ([{}, {"weight": 2.0}, {"weight": 3.0}], 2.0),
        ([{"density": 1.0}, {}, {"weight": 3.0}], 3.0),
        ([{"weight": 0}, {"weight": 3.0}], 0),
        ([{"weight": False}, {"weight": True}], False),
        ([{}, {}], None),
        ([], None),
        # filters: the first substring that matches wins
        ([{"weight": filtered(("self_attn", 1.0), ("mlp", 2.0), ("up_proj", 3.0))}], 2.0),
        ([{"weight": filtered(("layers.11.", 1.0), ("layers.1.", 2.0))}], 2.0),
        ([{"weight": filtered((None, 1.0), ("mlp", 2.0))}], 1.0),
        ([{"weight": filtered(("*", 1.0), ("mlp", 2.0))}], 1.0),
        ([{"weight": filtered(("", 1.0), ("mlp", 2.0))}], 1.0),
        ([{"weight": filtered(("mlp", [0.0, 1.0]))}], 0.25),
        ([{"weight": filtered(("mlp", 0))}, {"weight": 5.0}], 0),
        # no match falls to the next scope
        ([{"weight": filtered(("self_attn", 1.0))}, {"weight": 5.0}], 5.0),
        ([{"weight": filtered(("a_", 1.0))}, {"weight": filtered(("mlp", 6.0))}], 6.0),
        ([{"weight": filtered(("self_attn", 1.0))}], None),
    ],
)
def test_the_narrowest_scope_with_a_value_for_the_tensor_decides(
    scopes: list[Tree], value: Any
) -> None:
    found = resolve("weight", scopes, TENSOR, 0.25)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("values", "t", "value"),
    [
        ([0.0, 1.0], 0.0, 0.0),
        ([0.0, 1.0], 0.3, 0.3),
        ([0.0, 1.0], 1.0, 1.0),
        ([0.0, 1.0, 0.0], 0.5, 1.0),
        ([0.0, 1.0, 0.0], 0.75, 0.5),  # p = 0.75 * 2 = 1.5
        ([2.0, 4.0, 8.0, 16.0], 0.5, 6.0),  # p = 0.5 * 3 = 1.5
        ([7.0], 0.6, 7.0),
    ],
)
def test_a_list_is_a_linear_gradient(values: list[float], t: float, value: float) -> None:
    assert resolve("weight", [{"weight": values}], TENSOR, t) == pytest.approx(value)


@settings(max_examples=100, derandomize=True, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=2, max_size=6), data=st.data())
def test_a_gradient_meets_its_values_and_never_leaves_them(
    values: list[float], data: st.DataObject
) -> None:
    scopes = [{"weight": values}]
    i = data.draw(st.integers(0, len(values) - 1))
    assert resolve("weight", scopes, TENSOR, i / (len(values) - 1)) == pytest.approx(values[i])
    anywhere = resolve("weight", scopes, TENSOR, data.draw(st.floats(0, 1)))
    assert anywhere is not None
    assert min(values) - 1e-9 <= anywhere <= max(values) + 1e-9
