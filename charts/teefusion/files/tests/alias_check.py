"""A registered version found by its alias, as the student server finds its champion."""

import os
import uuid

from mlflow import MlflowClient


def main() -> None:
    client = MlflowClient()
    name = f"helm-test-{uuid.uuid4().hex[:12]}"
    client.create_registered_model(name)
    try:
        made = client.create_model_version(name, f"{os.environ['S3_URI']}/{name}")
        client.set_registered_model_alias(name, "champion", made.version)
        found = client.get_model_version_by_alias(name, "champion")
        assert (found.version, found.source) == (made.version, made.source)
    finally:
        client.delete_registered_model(name)
    print("the registry gives a version by its alias")


if __name__ == "__main__":
    main()
