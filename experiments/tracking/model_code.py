"""What MLflow runs when it loads a logged network: see `experiments.tracking.model`."""

from __future__ import annotations

from typing import Any

import mlflow
import pandas as pd
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class Segmentation(PythonModel):
    """NIfTI paths in, masks and volumes out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Remember where the network lies."""
        self.folder = context.artifacts["network"]

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> Any:
        """A row for each image of the column `image`, in its order; a study that fails has its reason in `error`."""
        from experiments.tracking.model_rows import rows

        return pd.DataFrame(rows(self.folder, [str(path) for path in model_input["image"]], dict(params or {})))


mlflow.models.set_model(Segmentation())
