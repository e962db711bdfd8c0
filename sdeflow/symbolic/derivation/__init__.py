"""The steps from f and g to all that follows from them, each re-checked by substituting its result.

``step`` is how a step is written and ``substitution`` how it is checked; each other module writes the steps of one
kind of SDE. Which kind an SDE is of is for ``sdeflow.proof.derivation`` to say.
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
