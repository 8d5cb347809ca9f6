"""The code that MLflow runs when it loads a logged network; see `experiments.tracking.model`."""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Segmentation(PythonModel):
    """Segments NIfTI files: writes their masks and returns their volumes."""

    def load_context(self, context: PythonModelContext) -> None:
        """Remember the folder of the network."""
        self.folder = context.artifacts["network"]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """One row for each image of the column `image`, in its order. If a study fails, `error` has the reason."""
        from experiments.tracking.model_rows import rows

        return pd.DataFrame(rows(self.folder, [str(path) for path in model_input["image"]], dict(params or {})))


mlflow.models.set_model(Segmentation())
