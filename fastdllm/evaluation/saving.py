# SPDX-License-Identifier: Apache-2.0
"""What lm-eval saves of a run: whole files only, and a note of what it could not save."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastdllm import whole


@contextlib.contextmanager
def noted_losses() -> Iterator[list[str]]:
    """Meanwhile results and samples appear in their folder when they are whole, and what lm-eval could not save is noted: it
    logs that it could not, and ends as if it had."""
    import lm_eval.loggers
    from lm_eval.loggers import evaluation_tracker

    lost: list[str] = []
    logger, known = evaluation_tracker.eval_logger, lm_eval.loggers.EvaluationTracker
    warning = logger.warning

    def noting(message: str, *args: Any, **options: Any) -> None:
        error = sys.exc_info()[1]  # what it is about to pass over
        if error is not None:
            lost.append(" ".join(f"{message % args if args else message}: {error}".split()))
        warning(message, *args, **options)

    class WholeFiles(known):  # type: ignore[misc, valid-type]
        def save_results_aggregated(self, *args: Any, **options: Any) -> None:
            self._aside(lambda: super(WholeFiles, self).save_results_aggregated(*args, **options))

        def save_results_samples(self, *args: Any, **options: Any) -> None:
            self._aside(lambda: super(WholeFiles, self).save_results_samples(*args, **options))

        def _aside(self, save: Callable[[], None]) -> None:
            if not self.output_path:
                return save()
            given, before = Path(self.output_path), len(lost)
            in_file = given.suffix == ".json"
            try:
                with whole.filling(given.parent if in_file else given) as partial:
                    self.output_path = str(partial / given.name if in_file else partial)
                    save()
                    if len(lost) > before:  # what there is of it is torn
                        shutil.rmtree(partial)
            except OSError as error:
                lost.append(f"Could not save to {given}: {error.strerror}")
            finally:
                self.output_path = str(given)

    logger.warning = noting
    lm_eval.loggers.EvaluationTracker = WholeFiles
    try:
        yield lost
    finally:
        del logger.warning
        lm_eval.loggers.EvaluationTracker = known
