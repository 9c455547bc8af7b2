"""Recipes: read, checked, written, hashed, and resolved for one tensor."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.errors import RecipeError
from evomerge.recipe import DTYPES, METHODS, Filtered, Recipe, resolve

NAMES = ["models/a", "org/b@v1", "/c d", "日本", "2024"]
FLAGS = {"normalize", "rescale", "int8_mask"}
FILTERS = ["self_attn", "mlp", "layers.1.", "norm", "*", ""]
Tree = dict[str, Any]


def _scalars(name: str) -> st.SearchStrategy[Any]:
    if name in FLAGS:
        return st.booleans()
    if name == "density":
        return st.floats(0.01, 1) | st.just(1)
    return st.floats(-1e6, 1e6) | st.integers(-3, 3)


def _values(name: str) -> st.SearchStrategy[Any]:
    plain = _scalars(name) | st.lists(_scalars(name), min_size=1, max_size=3)
    filters = {"filter": st.sampled_from(FILTERS)}
    entry = st.fixed_dictionaries({"value": plain}, optional=filters)
    return plain | st.lists(entry, min_size=1, max_size=3)


def _parameters(method: str) -> st.SearchStrategy[Tree]:
    known = {**METHODS[method].per_model, **METHODS[method].shared}
    return st.fixed_dictionaries({}, optional={name: _values(name) for name in known})


@st.composite
def recipes(draw: st.DrawFn) -> Tree:
    """Plain data of any valid recipe: scalars, gradients, filters, models or slices."""
    method = draw(st.sampled_from(sorted(METHODS)))
    name, parameters = st.sampled_from(NAMES), _parameters(method)
    optional = {"parameters": parameters}
    tree: Tree = {"merge_method": method}
    if draw(st.booleans()):
        entry = st.fixed_dictionaries({"model": name}, optional=optional)
        tree["models"] = draw(st.lists(entry, min_size=1, max_size=3))
    else:
        tree["slices"] = []
        for length in draw(st.lists(st.integers(1, 4), min_size=1, max_size=3)):
            ranges = st.integers(0, 9).map(lambda start, n=length: [start, start + n])
            source = {"model": name, "layer_range": ranges}
            sources = st.lists(
                st.fixed_dictionaries(source, optional=optional), min_size=1, max_size=2
            )
            extra = {**optional, "base_model": name}
            tree["slices"].append(draw(st.fixed_dictionaries({"sources": sources}, optional=extra)))
    if METHODS[method].base or draw(st.booleans()):
        tree["base_model"] = draw(name)
    dtype = st.sampled_from(DTYPES)
    named = Recipe.from_dict(tree).model_names()
    tokenizers = st.sampled_from([*named, f"model:{named[0]}", "base", "union"])
    rest = {"dtype": dtype, "out_dtype": dtype, "tokenizer_source": tokenizers, **optional}
    return tree | draw(st.fixed_dictionaries({}, optional=rest))


def hashes(tree: Tree) -> dict[str, str]:
    """A content hash for every model that a recipe names."""
    names = Recipe.from_dict(tree).model_names()
    return {name: f"{NAMES.index(name):064x}" for name in names}


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


@settings(max_examples=100, deadline=None)
@given(recipes())
def test_a_recipe_survives_writing_and_reading(tree: Tree) -> None:
    recipe = Recipe.from_dict(tree)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_writing_adds_nothing_that_was_not_given(tree: Tree) -> None:
    def without_empty(node: Tree) -> Tree:
        return {k: v for k, v in node.items() if v != {}}

    written = yaml.safe_load(Recipe.from_dict(tree).to_yaml())
    assert written == rebuilt(tree, lambda leaf: leaf, without_empty)


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_the_hash_ignores_key_order(tree: Tree) -> None:
    turned = rebuilt(tree, lambda leaf: leaf, lambda node: dict(reversed(node.items())))
    assert sha(turned) == sha(tree)


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_the_hash_ignores_how_a_number_is_spelt(tree: Tree) -> None:
    def as_float(leaf: Any) -> Any:
        if isinstance(leaf, bool) or not isinstance(leaf, int | float):
            return leaf
        return -0.0 if leaf == 0 else float(leaf)

    assert sha(rebuilt(tree, as_float)) == sha(tree)


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_the_hash_ignores_empty_parts(tree: Tree) -> None:
    def padded(node: Tree) -> Tree:
        if "model" in node or "sources" in node or "merge_method" in node:
            node.setdefault("parameters", {})
        if "value" in node:
            node.setdefault("filter", None)
        if "merge_method" in node:
            node = {"dtype": None, "models": None, "slices": None, **node}
        return node

    assert sha(rebuilt(tree, lambda leaf: leaf, padded)) == sha(tree)


@settings(max_examples=50, deadline=None)
@given(recipes())
def test_the_hash_ignores_where_a_model_lies(tree: Tree) -> None:
    moved = {name: f"/elsewhere/{i}" for i, name in enumerate(NAMES)}
    content = hashes(tree)
    there = {moved[name]: digest for name, digest in content.items()}

    def renamed(node: Tree) -> Tree:
        keys = ("model", "base_model", "tokenizer_source")
        return {
            k: moved.get(v.removeprefix("model:"), v) if k in keys else v for k, v in node.items()
        }

    elsewhere = Recipe.from_dict(rebuilt(tree, lambda leaf: leaf, renamed))
    assert elsewhere.sha(there) == sha(tree)


@settings(max_examples=50, deadline=None)
@given(recipes(), st.data())
def test_the_hash_changes_with_any_model_content(tree: Tree, data: st.DataObject) -> None:
    content = hashes(tree)
    name = data.draw(st.sampled_from(sorted(content)))
    assert Recipe.from_dict(tree).sha({**content, name: "f" * 64}) != sha(tree)


@settings(max_examples=100, deadline=None)
@given(recipes().filter(lambda tree: any(numbers(tree))), st.data())
def test_the_hash_changes_with_any_value(tree: Tree, data: st.DataObject) -> None:
    changed = copy.deepcopy(tree)
    *path, last = data.draw(st.sampled_from(list(numbers(tree))))
    node: Any = changed
    for step in path:
        node = node[step]
    old = node[last]
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
        recipe.base_model = "b"  # type: ignore[misc]  # frozen for the type checker too


MODELS = [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]
LINEAR: Tree = {"merge_method": "linear", "models": MODELS}
TIES: Tree = {"merge_method": "ties", "models": MODELS, "base_model": "base"}
FORMS = "give a number, a list of numbers or a list of {filter, value} entries"


def stack(*sources: Tree, **rest: Any) -> Tree:
    return {"merge_method": "linear", "slices": [{"sources": list(sources)}], **rest}


def piece(start: Any, end: Any) -> Tree:
    return {"model": "a", "layer_range": [start, end]}


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
        ({**LINEAR, "models": []}, "models: the list is empty: name at least one model"),
        ({**LINEAR, "models": "a"}, "models: 'a': give a list"),
        ({**LINEAR, "models": ["a"]}, "models[0]: 'a': give keys and their values"),
        ({**LINEAR, "slices": []}, "give either 'models' or 'slices'"),
        ({"merge_method": "linear"}, "give either 'models' or 'slices'"),
        ({**LINEAR, "dtype": "float33"}, "dtype: 'float33' is unknown: did you mean 'float32'?"),
        ({**LINEAR, "out_dtype": "x"}, "out_dtype: 'x' is unknown: known: bfloat16, float16"),
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
                {"value": 1},
                [{"filter": "a", "value": "x"}],
                [{"filter": "a", "value": []}],
                [{"filter": "a", "vlue": 1}],
                [{"filter": "a", "value": 1}, 2],
            )
        ),
        ({**TIES, "parameters": {"normalize": 3}}, "parameters.normalize: 3 is not a truth value"),
        ({**LINEAR, "parameters": 3}, "parameters: 3: give keys and their values"),
        ({"merge_method": "linear", "slices": []}, "slices: the list is empty"),
        (stack(), "slices[0].sources: the list is empty: give at least one source"),
        *(
            (stack(piece(a, b)), f"slices[0].sources[0].layer_range: [{a}, {b}] holds no layer")
            for a, b in [(2, 2), (3, 2), (-1, 2)]
        ),
        (stack(piece(0, "x")), "slices[0].sources[0].layer_range[1]: 'x'"),
        (stack({"model": "a"}), "slices[0].sources[0].layer_range: required, and missing"),
        (stack(piece(0, 2), piece(0, 3)), "slices[0].sources: ranges of [2, 3] layers"),
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


@settings(max_examples=100, deadline=None)
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
