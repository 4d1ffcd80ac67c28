"""What the runner's account may do, and that it may do no more. Runs with that account's token."""

import os
import sys

from kubernetes import client, config

ALLOWED = [
    ("trainer.kubeflow.org", "trainjobs", "", ("create", "get", "list", "watch", "delete")),
    ("trainer.kubeflow.org", "trainingruntimes", "", ("get",)),
    ("", "pods", "", ("get", "list", "watch")),
    ("", "pods", "log", ("get",)),
    ("", "events", "", ("get", "list", "watch")),
]


def may(namespace: str, group: str, resource: str, subresource: str, verb: str) -> bool:
    attributes = client.V1ResourceAttributes(
        namespace=namespace, group=group, resource=resource, subresource=subresource, verb=verb
    )
    review = client.V1SelfSubjectAccessReview(spec=client.V1SelfSubjectAccessReviewSpec(resource_attributes=attributes))
    return bool(client.AuthorizationV1Api().create_self_subject_access_review(review).status.allowed)


def main() -> None:
    config.load_incluster_config()
    namespace = os.environ["NAMESPACE"]
    denied = [
        f"{verb} {'/'.join(filter(None, (resource, subresource)))}"
        for group, resource, subresource, verbs in ALLOWED
        for verb in verbs
        if not may(namespace, group, resource, subresource, verb)
    ]
    if denied:
        sys.exit(
            f"the runner's account may not: {', '.join(denied)}. Set runner.rbac.create=true, or bind a Role to it."
        )
    if may("kube-system", "", "secrets", "", "get"):
        sys.exit("the runner's account may read secrets of kube-system: a binding outside this chart gives too much.")
    print("the runner's account has its permissions in this namespace, and none outside")


if __name__ == "__main__":
    main()
