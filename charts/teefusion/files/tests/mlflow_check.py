"""A run made, read and removed over the Service's name: address, allowed hosts, credentials, database, artifacts."""

import os
import uuid
from pathlib import Path

from mlflow import MlflowClient


def main() -> None:
    client = MlflowClient()
    name = f"helm-test-{uuid.uuid4().hex[:12]}"
    experiment = client.create_experiment(name)
    try:
        run = client.create_run(experiment).info.run_id
        client.log_metric(run, "answer", 42.0)
        assert client.get_run(run).data.metrics == {"answer": 42.0}
        file = Path("/tmp/artifact.txt")
        file.write_text(name)
        client.log_artifact(run, str(file))
        assert Path(client.download_artifacts(run, file.name, "/tmp/back")).read_text() == name
    finally:
        client.delete_experiment(experiment)
    print(f"MLflow at {os.environ['MLFLOW_TRACKING_URI']}: run, metric and artifact written and read")


if __name__ == "__main__":
    Path("/tmp/back").mkdir(exist_ok=True)
    main()
