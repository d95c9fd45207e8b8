"""Recipes before anything runs: what resolves, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mixtools.errors import RecipeError
from mixtools.recipe import made as recipe_made
from mixtools.recipe import resolve as recipe
from mixtools.recipe.resolve import Option, Verb

VERBS = {
    "convert to-hf": Verb(
        "convert to-hf",
        {
            "src": Option(str, True, model=True),
            "out": Option(str, True, folder=True),
            "dtype": Option(str, False, "keep", choices=("keep", "bf16")),
            "factored": Option(bool, False, False),
            "samples": Option(int, False, 32, low=1, high=64),
            "rule": Option(str, False, None, choices=("mp", "rank=512")),
            "text": Option(str, False, None, file=True),
            "gate": Option(str, False, None, many=True),
        },
        frozenset({"jobs"}),
    ),
}
HEAD = "name: n\ndescription: d\n"


def text(more: str = "", vars: str = "{source: ., out: o}") -> str:
    step = 'do: convert to-hf, src: "${source}", out: "${out}/a"'
    return f"{HEAD}vars: {vars}\nsteps:\n- {{{step}{more}}}\n"


def steps(content: str, *pairs: str) -> list[recipe.Step]:
    return recipe.resolve(recipe.override(recipe.parse(content, "r.yaml"), pairs), VERBS)


def test_references_defaults_and_types() -> None:
    second = '- {do: convert to-hf, as: again, src: "${steps.convert.out}", out: "${out}/b", gate: [x=1, y=2]}\n'
    first, again = steps(text(", factored: true, samples: 8, rule: rank=3") + second)
    assert first.options == {
        "src": ".", "out": "o/a", "dtype": "keep", "factored": True, "samples": 8, "rule": "rank=3",
    }  # fmt: skip
    assert again.options["src"] == "o/a" and again.options["gate"] == ["x=1", "y=2"] and again.out == Path("o/b")


def test_overrides_take_the_type_of_their_option() -> None:
    pairs = ("out=p", "vars.source=..", "steps.convert.samples=9", "steps.convert.factored=true",
             "steps.convert.rule=rank=007")  # fmt: skip
    (step,) = steps(text(), *pairs)
    assert step.options == {
        "src": "..", "out": "p/a", "dtype": "keep", "factored": True, "samples": 9, "rule": "rank=007",
    }  # fmt: skip
    (step,) = steps(text(', samples: "${n}"', vars="{source: ., out: o, n: 3}"), "n=5")
    assert step.options["samples"] == 5


@pytest.mark.parametrize(
    ("content", "pairs", "said"),
    [
        (text(", dtyp: keep"), (), "r.yaml: steps.convert.dtyp: .*did you mean dtype?"),
        (text(", dtype: bf17"), (), "steps.convert.dtype: 'bf17' is not one of keep, bf16; did you mean bf16"),
        (text(", rule: mp=3"), (), "'mp=3' is not one of"),
        (text(", rule: rank"), (), "'rank' is not one of"),
        (text(", factored: 1"), (), "steps.convert.factored: must be true or false"),
        (text(", samples: '8'"), (), "steps.convert.samples: must be a whole number"),
        (text(", samples: true"), (), "steps.convert.samples: must be a whole number"),
        (text(", samples: 65"), (), "65 is out of range"),
        (text(", samples: [1]"), (), "must be a whole number"),
        (text(", dtype: yes"), (), "must be a text"),
        (text(", jobs: 3"), (), "steps.convert.jobs: says how, not what; .* --jobs"),
        (text(", text: missing.txt"), (), "steps.convert.text: missing.txt does not exist"),
        (text(', dtype: "${dtpe}"'), (), "nothing above is called"),
        (text(', dtype: "${steps.later.out}"'), (), "nothing above is called"),
        (text(vars="{source: null, out: o}"), (), "steps.convert.src: has no value; give source=VALUE"),
        (text(vars="{source: ., out: null}"), (), "out} has no value; give out=VALUE"),
        (text(vars="{source: nowhere, out: o}"), (), "steps.convert.src: nowhere does not exist"),
        (text(vars="{source: ., out: [1]}"), (), "vars: must map names to single values"),
        (text(), ("sorce=x",), "no variable 'sorce'; did you mean source?"),
        (text(), ("source",), "'source' is no key=value"),
        (text(), ("steps.convrt.dtype=keep",), "no step 'convrt'; did you mean convert?"),
        (text(), ("steps.convert.dtyp=keep",), "did you mean dtype?"),
        (text(), ("steps.convert.do=check",), "name an option"),
        (text(), ("steps.convert.samples=many",), "must be a whole number"),
        (text() + "stepz: []\n", (), "unknown key 'stepz'; did you mean steps?"),
        (text() + "name: m\n", (), "line 6: key 'name' is there twice"),
        (text(", dtype: keep, dtype: bf16"), (), "key 'dtype' is there twice"),
        (text().replace("to-hf", "to-fh"), (), "unknown verb 'convert to-fh'; did you mean convert to-hf?"),
        (text() + '- {do: convert to-hf, src: ., out: x}\n', (), "two steps have this name"),
        (text() + '- {do: convert to-hf, as: b, src: ., out: o/a}\n', (), "steps.b.out: o/a is what steps.conv"),
        (text() + "- {src: .}\n", (), "steps: number 2 must say what to `do`"),
        (HEAD + "steps: []\n", (), "steps: must be a list"),
        ("name: n\nsteps: []\n", (), "description: must be a text"),
        ("- a\n", (), "is no recipe"),
        ("", (), "is no recipe"),
        ("name: [\n", (), "is no YAML in line"),
        ("a: &x [1]\nb: *x\n", (), "holds an alias"),
        ("a: !!python/object/apply:os.system [ls]\n", (), "is no YAML in line 1"),
        ("[" * 5000, (), "is no YAML"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_by_name(content: str, pairs: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        steps(content, *pairs)
    assert str(caught.value).startswith("r.yaml: ") and "\n" not in str(caught.value)


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    large = tmp_path / "large.yaml"
    large.write_bytes(b"#" * (recipe.MAX_BYTES + 1))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    for name, said in (("large", "larger than"), ("binary", "not UTF-8"), ("missing", "is no file")):
        with pytest.raises(RecipeError, match=said):
            recipe.load(tmp_path / f"{name}.yaml")


def test_the_copy_is_a_recipe_that_resolves_to_the_same_steps() -> None:
    found = recipe.parse(text(', dtype: "${d}", samples: 8', vars="{source: ., out: o, d: bf16}"), "r.yaml")
    resolved = recipe.resolve(found, VERBS)
    copy = recipe_made.resolved(found, resolved, resolved[0], "00")
    assert steps(copy.decode()) == resolved
    assert yaml.safe_load(copy)["made"]["step"] == "convert"
    assert copy == recipe_made.resolved(found, resolved, resolved[0], "00")


def test_inputs_differ_by_name_size_head_and_tail_but_not_by_a_copied_recipe(tmp_path: Path) -> None:
    def of(**files: bytes) -> str:
        folder = tmp_path / "in"
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            path.unlink()
        for name, data in files.items():
            (folder / name.replace("_", ".")).write_bytes(data)
        return recipe_made.digest([folder])

    large = b"a" * (3 << 20)
    cases = [{"x": large}, {"y": large}, {"x": large + b"a"}, {"x": b"b" + large[1:]}, {"x": large[1:] + b"b"}]
    assert len({of(**case) for case in cases}) == len(cases)
    assert of(x=large) == of(x=large, recipe_yaml=b"z")
