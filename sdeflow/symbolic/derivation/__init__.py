"""The steps of a derivation from f and g, each checked by substitution of its result.

``step`` says how a step is written, and ``substitution`` how it is checked. Each other module writes the steps of one
kind of SDE; ``sdeflow.proof.derivation`` chooses it.
"""

from sdeflow.symbolic.derivation.equations import declared, equation_steps, general_steps, is_smooth
from sdeflow.symbolic.derivation.linear import linear_steps
from sdeflow.symbolic.derivation.pearson import pearson_steps
from sdeflow.symbolic.derivation.reducible import reducible_steps
from sdeflow.symbolic.derivation.step import SIGNS, Notation, Step, equals
from sdeflow.symbolic.derivation.substitution import check_times, judged, verify

__all__ = [
    "SIGNS", "Notation", "Step", "check_times", "declared", "equals", "equation_steps", "general_steps", "is_smooth",
    "judged", "linear_steps", "pearson_steps", "reducible_steps", "verify",
]  # fmt: skip
