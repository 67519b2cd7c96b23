"""Modules whose examples can only be read where an optional package is installed are left out elsewhere."""

from importlib.util import find_spec

NEEDS = {
    "numba": ["merge/ties_kernel.py", "nn/select_kernel.py", "nn/sparse_mlp_numba.py"],
    "triton": ["nn/sparse_mlp_triton.py"],
}
collect_ignore = [
    f"src/downriver/{module}" for package, modules in NEEDS.items() if not find_spec(package) for module in modules
]
