"""Random declarations of the whole grammar, as text and as SymPy, with constants of any size, parameters and tables."""

import numpy as np
import sympy as sp
import torch

import sdeflow
from sdeflow import SDE, t, x
from sdeflow.symbolic.tree import FUNCTIONS, OF_TIME_ALONE

LATER = {function.__name__ for function in OF_TIME_ALONE}
OF_TWO = {
    "Mod", "atan2", "Max", "Min", "besselj", "bessely", "besseli", "besselk", "lowergamma", "uppergamma", "expint",
    "beta",
}  # fmt: skip
SPECIAL = sorted(LATER | {"gamma", "loggamma"})
PLAIN = sorted(set(FUNCTIONS) - set(SPECIAL) - OF_TWO)
FREQUENT = ["exp", "log", "sqrt", "sin", "cos", "tanh", "Abs", "floor", "frac", "Heaviside", "sign"]
CONSTANTS = ["pi", "E", "1e-30", "1e-9", "1/1000", "0.1", "7/3", "19.9", "1e3", "123456789", "1e9", "1e30", "2**60"]


class Grammar:
    """Draws expressions of the grammar as text; deeper ones with a larger ``depth``."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.names = []

    def one_of(self, choices):
        return choices[self.rng.integers(len(choices))]

    def chance(self, probability):
        return self.rng.random() < probability

    def constant(self):
        return self.one_of(CONSTANTS) if self.chance(0.3) else str(self.rng.integers(1, 8))

    def leaf(self, symbols):
        return self.one_of(symbols) if self.chance(0.65) else self.constant()

    def expression(self, symbols, depth):
        """Text in ``symbols`` that is at most ``depth`` levels deep."""
        if depth <= 0 or self.chance(0.1):
            return self.leaf(symbols)
        rules = (self.sum, self.product, self.quotient, self.power, self.function, self.function, self.branched)
        return self.one_of(rules)(symbols, depth - 1)

    def several(self, symbols, depth):
        count = 2 + int(self.rng.geometric(0.6)) if not self.chance(0.03) else 30
        return [self.expression(symbols, depth if count < 30 else min(depth, 1)) for _ in range(count)]

    def sum(self, symbols, depth):
        return "(" + "".join(self.one_of("+-") + term for term in self.several(symbols, depth)) + ")"

    def product(self, symbols, depth):
        return "(" + "*".join(self.several(symbols, depth)) + ")"

    def quotient(self, symbols, depth):
        return f"({self.expression(symbols, depth)}/{self.expression(symbols, depth)})"

    def power(self, symbols, depth):
        if self.chance(0.15):
            return f"({self.expression(symbols, depth)})**({self.expression(symbols, depth)})"
        exponents = ["2", "3", "8", "12", "40", "64", "(1/2)", "(1/3)", "(-1)", "(-2)", "(7/2)", "0.1", "(22/7)"]
        return f"({self.expression(symbols, depth)})**{self.one_of(exponents)}"

    def function(self, symbols, depth):
        of_time = "x" not in symbols
        names = FREQUENT if self.chance(0.5) else PLAIN if self.chance(0.6) or not of_time else [*SPECIAL, *OF_TWO]
        name = self.one_of(sorted(names) if isinstance(names, set) else names)
        if name in OF_TWO:
            first = str(self.rng.integers(0, 4)) if name in LATER and self.chance(0.8) else None
            first = first or self.expression(symbols, depth)
            return f"{name}({first}, {self.expression(symbols, depth)})"
        return f"{name}({self.expression(symbols, depth)})"

    def branched(self, symbols, depth):
        if self.chance(0.5):
            arguments = ", ".join(self.several(symbols, depth)[:4])
            return f"{self.one_of(['Max', 'Min'])}({arguments})"
        value, other = self.expression(symbols, depth), self.expression(symbols, depth)
        return f"Piecewise(({value}, {self.condition(symbols, depth)}), ({other}, True))"

    def condition(self, symbols, depth):
        sides = f"{self.expression(symbols, depth)} {self.one_of(['<', '<=', '>', '>='])} {self.leaf(symbols)}"
        if self.chance(0.2):
            return f"not ({sides})"
        return f"({sides}) {self.one_of(['and', 'or'])} (t > 1/3)" if self.chance(0.2) else sides

    # ------------------------------------------------------------ declarations

    def parameters(self):
        """Values of some of the symbols p and q: numbers, tensors, nn.Parameters."""
        found = {}
        for name in ("p", "q"):
            if self.chance(0.25):
                tensor = torch.tensor(self.rng.uniform(0.2, 3.0, self.one_of([(), (3,), (2, 1, 2)])))
                found[name] = self.one_of([float(self.rng.uniform(0.2, 3)), tensor, torch.nn.Parameter(tensor)])
        return found

    def coefficients(self, depth):
        """Texts of f and g, with the names that they hold."""
        params = self.parameters()
        of_time = ["t", "t", "t", *params]
        slope, push, noise = (self.expression(of_time, depth) for _ in range(3))
        if self.chance(0.7):
            f = self.one_of([f"-({slope})*x", f"-x*({slope}) + {push}", "-x", push, f"({push} - x)*({slope})"])
            return f, self.one_of([noise, f"1+({noise})**2", f"sqrt({noise})"]), params
        of_state = [*of_time, "x", "x"]
        f = self.expression(of_state, depth)
        g = self.one_of([
            noise, self.expression(of_state, depth), f"sqrt({push} + x)*({noise})", f"x*({noise})", "sqrt(x*(1-x))",
            f"sqrt(1 + x**2)*({noise})",
        ])  # fmt: skip
        return self.one_of([f, f"-x*({slope})", f"({push} - x)*({slope})"]), g, params

    def table(self):
        """A schedule of random values at 3 to 300 knots of [0, 2]."""
        knots = int(self.one_of([3, 20, 300]))
        return sdeflow.schedule((np.linspace(0, 2, knots), self.rng.uniform(0.1, 3.0, knots)), name="knotted")

    def declaration(self, depth):
        """What declares a random SDE when it is called, and text that shows it."""
        T = float(self.one_of([1.0, 1.0, 0.5, 0.999, 1e-3, 1e3]))
        kind = self.rng.choice(["text", "text", "text", "sympy", "tables", "coupled", "path"])
        f, g, params = self.coefficients(depth)
        if kind == "coupled":
            k = int(self.rng.integers(2, 4))
            names = ["u", "v", "w"][:k]
            linear = [
                "".join(f"-({self.expression(['t'], depth - 1)})*{name}" for name in names if self.chance(0.7)) or "0"
                for _ in names
            ]  # fmt: skip
            rows = linear if self.chance(0.7) else [self.expression(["t", *names], depth - 1) for _ in names]
            noise = [self.expression(["t"], depth - 1) if self.chance(0.6) else "0" for _ in names[1:]] + ["1"]
            return (lambda: SDE(rows, noise, T=T, state=names)), f"SDE({rows}, {noise}, T={T}, state={names})"
        if kind == "path":
            alpha, sigma = (self.expression(["t"], depth - 1) for _ in range(2))
            alpha = self.one_of(["1-t", "cos(pi*t/2)", f"exp(-t*({alpha})**2)", f"1/(1+t*({alpha})**2)", alpha])
            sigma = self.one_of(["t", f"t*({sigma})", f"sqrt(t)*({sigma})", sigma])
            T = min(T, 0.999)
            return (lambda: SDE.from_kernel(alpha, sigma, T)), f"SDE.from_kernel({alpha!r}, {sigma!r}, {T})"
        shown = f"SDE({f!r}, {g!r}, T={T}, params={params})"
        if kind == "text":
            return (lambda: SDE(f, g, T=T, params=params)), shown
        names = {"x": x, "t": t, **{name: sp.Symbol(name) for name in params}}
        read = [self.read(text, names) for text in (f, g)]
        if kind == "tables":
            beta = self.table()
            read = [read[0] * beta(t), read[1] + beta(t) * sp.Symbol("t", real=True) ** 0]
        return (lambda: SDE(*read, T=T, params=params)), f"{kind}: {shown}"

    def read(self, text, names):
        """``text`` as SymPy, by the library's own grammar."""
        from sdeflow.symbolic.grammar import parse

        return parse(text, names)
