"""Remove for good what was deleted in MLflow a while ago: ``collect.py 30d``. Runs in the MLflow image as a CronJob.

In this process, as the command would take the database's URI, with its password, as an argument.
"""

import os
import sys

import mlflow.cli

if __name__ == "__main__":
    # MLFLOW_TRACKING_URI is the server, through which artifacts are removed.
    mlflow.cli.gc.main(["--older-than", sys.argv[1], "--backend-store-uri", os.environ["MLFLOW_BACKEND_STORE_URI"]])
