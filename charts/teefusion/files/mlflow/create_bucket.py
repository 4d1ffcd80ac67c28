"""Create the buckets named as arguments in the development store, unless they are there. Runs in the MLflow image."""

import os
import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError

PATIENCE_S = 180


def main() -> None:
    client = boto3.client("s3", endpoint_url=os.environ["MLFLOW_S3_ENDPOINT_URL"])
    end = time.monotonic() + PATIENCE_S
    for bucket in sys.argv[1:]:
        while True:
            try:
                if bucket not in [found["Name"] for found in client.list_buckets()["Buckets"]]:
                    client.create_bucket(Bucket=bucket)
                print(f"bucket {bucket} is there")
                break
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > end:
                    sys.exit(f"bucket {bucket} cannot be created: {error}")
                time.sleep(3)


if __name__ == "__main__":
    main()
