"""What every room shares and no more: measurements, budgets, seeds, errors, paired statistics, safe files."""

from downriver.core.budget import Budget
from downriver.core.cost import Meter, charge, count_flops, metered
from downriver.core.errors import DownriverError, InputError, MissingExtra, require, unknown
from downriver.core.io import atomic_folder, atomic_write, canonical, fingerprint, sha256_file
from downriver.core.measurement import Cost, Measurement, current_versions
from downriver.core.seeds import derive_seed, generator, seeded

__all__ = [
    "Budget",
    "Cost",
    "DownriverError",
    "InputError",
    "Measurement",
    "Meter",
    "MissingExtra",
    "atomic_folder",
    "atomic_write",
    "canonical",
    "charge",
    "count_flops",
    "current_versions",
    "derive_seed",
    "fingerprint",
    "generator",
    "metered",
    "require",
    "seeded",
    "sha256_file",
    "unknown",
]
