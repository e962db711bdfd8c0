"""SciPy's functions for SymPy's: functions that neither torch nor NumPy computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import sympy as sp

__all__ = ["special_functions"]


@cache
def special_functions() -> dict[type, Callable[..., np.ndarray]]:
    """SciPy's functions by SymPy class, imported when first needed: the import of SciPy takes a third of a second."""
    from scipy import special

    return {
        sp.besselj: special.jv, sp.bessely: special.yv,
        sp.besseli: special.iv, sp.besselk: special.kv,
        sp.lowergamma: lambda a, z: special.gammainc(a, z) * special.gamma(a),
        sp.uppergamma: lambda a, z: special.gammaincc(a, z) * special.gamma(a),
        sp.LambertW: lambda z, k=0: special.lambertw(z, int(np.max(k))).real,
        sp.erfi: special.erfi, sp.erfinv: special.erfinv, sp.Ei: special.expi,
        sp.expint: special.expn, sp.digamma: special.digamma, sp.zeta: special.zeta,
        sp.Si: lambda z: special.sici(z)[0], sp.Ci: lambda z: special.sici(z)[1],
        sp.Shi: lambda z: special.shichi(z)[0], sp.Chi: lambda z: special.shichi(z)[1],
        sp.fresnels: lambda z: special.fresnel(z)[0], sp.fresnelc: lambda z: special.fresnel(z)[1],
        sp.elliptic_k: special.ellipk, sp.beta: special.beta, sp.airyai: lambda z: special.airy(z)[0],
        sp.airybi: lambda z: special.airy(z)[2],
        sp.erf: special.erf, sp.erfc: special.erfc, sp.gamma: special.gamma, sp.loggamma: special.loggamma,
    }  # fmt: skip
