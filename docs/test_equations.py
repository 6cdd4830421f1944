"""docs/equations.md is executed, formula by formula as it is printed, and takes the path of the reference."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from parity_tests import cases
from parity_tests.reference import Reference

PAGE = (Path(__file__).parent / "equations.md").read_text()
FORMULA = re.compile(r"\$`([^`]+)`\$")
WORDS = {
    r"\max(": "max(",
    r"\text{step}": "step",
    r"_{\max}": "_max",
    r"_\infty": "_inf",
    r"\leftarrow": "=",
    r"\lambda": "decay",
    r"\,": " * ",  # a thin space multiplies
    "^{+}": "_new",
    "\\": "",
}


class Matrix(np.ndarray):
    """An array whose product with another is that of matrices."""

    def __mul__(self, other):
        return self @ other


def polar(h):
    """Runs the rows of the page that make a polar factor."""
    names = {"h": h.T if len(h) > h.shape[1] else h}
    run(*rows("polar, first"), names)
    names["X"] = names["X"].view(Matrix)
    for _ in range(5):
        run(*rows("polar, 5 times"), names)
    p = names["X"].view(np.ndarray)
    return p.T if len(h) > h.shape[1] else p


FUNCTIONS = {
    "sqrt": np.sqrt,
    "min": min,
    "max": max,
    "norm": np.linalg.norm,
    "mean": lambda a: a.mean(1, keepdims=True),
    "polar": polar,
}


def run(formula, names):
    """Runs the assignments of a formula of LaTeX."""
    for code in formula.split(r"\quad"):
        code = code.replace(r"^{\top}", ".T")
        code = re.sub(r"\^\{(?!\+)([^{}]+)\}", r"**(\1)", code)
        code = re.sub(r"operatorname\{(\w+)\}", r"\1", code)
        for letter, word in WORDS.items():
            code = code.replace(letter, word)
        code = re.sub(r"sqrt\{([^{}]*)\}", r"sqrt(\1)", code)
        code = re.sub(r"d?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1) / (\2))", code)
        code = re.sub(r"sqrt\{([^{}]*)\}", r"sqrt(\1)", code)  # that of a fraction
        exec(code.strip(), FUNCTIONS, names)


def rows(first, following=0):
    """Returns the first formula of the row of a table that begins so, and of some rows after it."""
    lines = PAGE.splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    return [FORMULA.findall(line.split("| ", 2)[2])[0] for line in lines[start : start + 1 + following]]


SECOND = rows("AdamW", 1)
RATE = re.findall(r"^```math\n(.*?)\n```", PAGE, re.MULTILINE)
DIRECTIONS = {
    "sgd": rows("SGD"),
    "adamw": SECOND[:1] + rows("AdamW with $`\\mu > 0`$", 1),
    "radam": SECOND + RATE,
    "muon": rows("Muon", 3),
    "muon original": rows("Muon", 2) + rows('Muon, `"original"`'),
    "muon rows": rows("Muon", 2) + rows("NorMuon", 2),
    "muon rows original": rows("Muon", 2) + rows("NorMuon", 1) + rows('NorMuon, `"original"`'),
}
MUON = {
    "ns_steps": 5,
    "nesterov": True,
    "b2_rows": 0.7,
    "output_axis": "first",
    "adam_lr_ratio": 1.0,
    "mu": 0.8,
}
SHAPE = (4, 3)
SHARED = cases.AVERAGING | cases.DECAY | {"beta": 0.9, "r": 0.5, "eps": 1e-3, "weight_decay": 0.1, "b2": 0.9}
OPTIONS = {"lr": 0.1, "weight_lr_power": 2, "prior_steps": 0, "warmup_steps": 5, "silent_sgd_phase": True}
LETTERS = {"beta": 0.9, "r": 0.5, "epsilon": 1e-3, "decay": 0.1, "beta_2": 0.9, "p": 2, "n": 5, "mu": 0.8}
LETTERS |= {"a": SHAPE[0], "b": SHAPE[1], "beta_u": 0.7}


# Row of the page -> the options that it is for, and the row of the law that it replaces or follows.
OTHERS = {
    "F3": ({"weight_lr": "current"}, "S4"),
    "F5 refined": ({"refined_c": 12.0}, "S5"),
    "F5 window": ({"window": 5}, "S5"),
    "F5 constant": ({"window": 5, "window_rule": "constant"}, "S5"),
    "F6 at z": ({"decay_at": "z"}, "S6"),
    "F6 squared": ({"decay_power": 2}, "S6"),
    "F6 normalized": ({"decay_power": "normalized"}, "S6"),
}
MORE = {"C": 12.0, "N": 5}
# Row of a beta that rises -> the options that it is for, and its letters.
BETAS = {
    "F9 anneal": (
        {"beta_rule": "anneal", "beta_max": 0.99, "beta_anneal_steps": 7},
        {"A": 7, "beta_max": 0.99},
    ),
    "F9 amuse": ({"beta_rule": "amuse", "beta_hold_steps": 4, "rho": 0.8}, {"T": 4, "rho": 0.8}),
}


def parts(row):
    """Returns all formulas of the first column of a row."""
    (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| {row} |"))
    return FORMULA.findall(line.split(" | ")[1])


def follow(optimizer, other=None):
    """Runs 12 steps of the formulas, one row of them another; each must be the reference's."""
    options, replaced = OTHERS.get(other, ({}, None))
    options, letters = BETAS.get(other, (options, {}))

    def law(tag):
        found = rows(tag)
        if tag == replaced:
            found = [*(found if tag == "S5" else []), *rows(other)]
        return found

    kind, *of_matrices = optimizer.split()
    size = SHAPE if kind == "muon" else 3
    random = np.random.default_rng(0)
    start = random.normal(size=size)
    own = {"inner_momentum": 0.8 if optimizer == "adamw" else 0.0}
    if kind == "muon":
        own = MUON | {"normalize": "rows" if "rows" in of_matrices else "none"}
        own["adjust_lr"] = "original" if "original" in of_matrices else "match_rms_adamw"
    reference = Reference(kind, {"p": start}, SHARED | OPTIONS | own | options)
    names = (
        LETTERS
        | MORE
        | letters
        | {"beta_0": 0.9}
        | dict.fromkeys("xyz", start)
        | {"v": 0.0, "m": 0.0, "u": 0.0, "gamma_max": 0.0, "W": np.float64(0)}
    )
    for step in range(12):
        names |= {"step": step, "gamma": 0.1 - 0.005 * step, "g": random.normal(size=size)}
        reference.update({"p": names["g"]}, names["gamma"])
        with np.errstate(invalid="ignore"):  # before rho_t > 4; and 0 / 0 while W = 0
            for formula in (*rows("S1"), *rows("S2"), *DIRECTIONS[optimizer]):
                run(formula, names)
            if optimizer == "radam" and names["rho_t"] <= 4:
                names["gamma_t"] = 0.0
            for formula in (*law("S3"), *law("S4"), *law("S5")):
                run(formula, names)
        names["c"] = names["c"] if names["W"] else 0.0
        for formula in (*law("S6"), *rows("S7", 1)):
            run(formula, names)
        if letters:
            for formula in reversed(parts(other)):  # what it is said with comes after it
                run(formula, names)
        run(*rows("F9" if letters else "S9"), names)
        both = names["y_new"]
        run(*rows(r"F9\*" if letters else "S9*"), names)
        np.testing.assert_allclose(names["y_new"], both, rtol=1e-12)
        names["beta"] = names.get("beta_new", names["beta"])
        names |= {letter: names[f"{letter}_new"] for letter in "xyz"}
        for letter, expected in zip("xyz", reference.iterates(), strict=True):
            np.testing.assert_allclose(names[letter], expected["p"], rtol=1e-12, err_msg=f"{letter}, {step}")
        run(*rows("x"), names)
        np.testing.assert_allclose(names["x"], reference.x["p"], rtol=1e-12)


@pytest.mark.parametrize("optimizer", DIRECTIONS)
def test_the_formulas_take_the_path_of_the_reference(optimizer):
    follow(optimizer)


@pytest.mark.parametrize("other", OTHERS)
def test_so_do_the_other_averages_and_decays(other):
    follow("sgd", other)


@pytest.mark.parametrize("rule", BETAS)
def test_so_do_the_betas_that_rise(rule):
    follow("sgd", rule)


WRONG = {
    "sgd": [("(1 - c)", "c"), (r"\beta\,x", "x"), (r"_{\max}^{p}", "_t^{p}"), ("z + ", "z - ")],
    "adamw": [(r"(1 - \beta_2^{t})", "1"), (r"\mu^{t}", r"\mu"), (r"d + \lambda", r"d - \lambda")],
    "radam": [("- 4)", "- 2)"), (r"2\,t", "t")],
    "muon": [(r"0.2\,\sqrt", r"\sqrt"), ("4.7750", "4.7755"), (r"\mu\,m +", "m +")],
    "muon original": [("a / b", "b / a")],
    "muon rows": [(r"a\,b", "a"), ("P^{2}", "P"), (r"(1 - \beta_u)", "0.5")],
    "muon rows original": [(r"\,\operatorname{norm}(P)", "")],
}


@pytest.mark.parametrize(
    ("optimizer", "right", "wrong"), [(name, *pair) for name, pairs in WRONG.items() for pair in pairs]
)
def test_a_wrong_formula_is_caught(optimizer, right, wrong, monkeypatch):
    def changed(formula, names, run=run):
        run(formula.replace(right, wrong), names)

    monkeypatch.setitem(globals(), "run", changed)
    with pytest.raises(AssertionError):
        follow(optimizer)
