"""Downstream tasks: built-in, from files, from Hugging Face datasets, or of lm-evaluation-harness."""

from typing import TYPE_CHECKING

from downriver.core.lazy import attach

if TYPE_CHECKING:
    from downriver.tasks.cells import CellBalancedSampler as CellBalancedSampler
    from downriver.tasks.cells import CellGrid as CellGrid
    from downriver.tasks.columns import from_columns as from_columns
    from downriver.tasks.from_datasets import from_datasets as from_datasets
    from downriver.tasks.from_files import from_files as from_files
    from downriver.tasks.generalization import InstructionBench as InstructionBench
    from downriver.tasks.generalization import InstructionTask as InstructionTask
    from downriver.tasks.generalization import Template as Template
    from downriver.tasks.generalization import overlap_report as overlap_report
    from downriver.tasks.leakage import LeakageReport as LeakageReport
    from downriver.tasks.leakage import leakage as leakage
    from downriver.tasks.lm_eval import lm_eval as lm_eval
    from downriver.tasks.load import load as load
    from downriver.tasks.load import names as names
    from downriver.tasks.task import Task as Task

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "CellBalancedSampler": "downriver.tasks.cells:CellBalancedSampler",
        "CellGrid": "downriver.tasks.cells:CellGrid",
        "InstructionBench": "downriver.tasks.generalization:InstructionBench",
        "InstructionTask": "downriver.tasks.generalization:InstructionTask",
        "LeakageReport": "downriver.tasks.leakage:LeakageReport",
        "Task": "downriver.tasks.task:Task",
        "Template": "downriver.tasks.generalization:Template",
        "from_columns": "downriver.tasks.columns:from_columns",
        "from_datasets": "downriver.tasks.from_datasets:from_datasets",
        "from_files": "downriver.tasks.from_files:from_files",
        "leakage": "downriver.tasks.leakage:leakage",
        "lm_eval": "downriver.tasks.lm_eval:lm_eval",
        "load": "downriver.tasks.load:load",
        "names": "downriver.tasks.load:names",
        "overlap_report": "downriver.tasks.generalization:overlap_report",
    },
)
