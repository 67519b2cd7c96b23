"""Run a paper's reproduction and, when asked, record what it found beside the code."""

import datetime
import json
from pathlib import Path

from downriver.core import atomic_write, current_versions
from downriver.reproductions.paper import EVIDENCE, evidence, overall, reproduction
from downriver.study import Result


def reproduce(
    slug: str,
    folder: str | Path = "downriver-runs",
    executor: str = "processes",
    seeds: int | None = None,
    fresh: bool = False,
    record: bool = False,
    progress: bool = True,
) -> list[Result]:
    """Run every study of a paper's reproduction and give back its results.

    ``record=True`` writes the verdicts with their figures into the evidence table of the installed package; a run with
    failed cells or fewer seeds than the study declares is never recorded.
    """
    module = reproduction(slug)
    results = [
        study.run(folder=folder, executor=executor, seeds=seeds, fresh=fresh, progress=progress)
        for study in module.studies
    ]
    whole = all(not r.failures for r in results) and (
        seeds is None or all(seeds >= study.seeds for study in module.studies)
    )
    if record and whole:
        verdicts = [v for r in results for v in r.verdicts()]
        found = evidence() | {
            slug: {
                "verdict": overall([v.verdict for v in verdicts]),
                "claims": [
                    {
                        "claim": v.claim.text,
                        "verdict": v.verdict,
                        "n": v.n,
                        "mean": round(v.mean, 6),
                        "low": round(v.low, 6),
                        "high": round(v.high, 6),
                        "p_holm": round(v.p_holm, 6),
                    }
                    for v in verdicts
                ],
                "date": datetime.date.today().isoformat(),
                "versions": dict(current_versions()),
            }
        }
        with atomic_write(EVIDENCE, "w") as file:
            json.dump(dict(sorted(found.items())), file, indent=1, ensure_ascii=False)
            file.write("\n")
    return results
