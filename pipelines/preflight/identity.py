"""Preflight check of the pods' rights on S3 where no secret gives them: by IRSA or by EKS Pod Identity."""

from collections.abc import Sequence

from dice_core.launch.kubernetes import KubernetesApi
from pipelines.preflight.findings import UncertainError

_ROLE = "eks.amazonaws.com/role-arn"
_POLICIES = "/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies"
_AGENT = "169.254.170.23/32"
"""EKS Pod Identity's agent on the node, which the base's network policy forbids with all link-local addresses."""


def check_identity(cluster: KubernetesApi, accounts: Sequence[str]) -> str:
    """Say by what the pods have rights, as far as the cluster's objects tell.

    Args:
        cluster: with the accounts.
        accounts: of the pods that read from S3.

    Raises:
        UncertainError: nothing gives rights, as far as can be seen.
    """
    found = {name: (cluster.named("serviceaccounts", name) or {}).get("metadata", {}) for name in accounts}
    without = [name for name, metadata in found.items() if not (metadata.get("annotations") or {}).get(_ROLE)]
    if not without:
        return f"IRSA: {' and '.join(accounts)} have a role"
    if _may_ask_agent(cluster):
        return f"EKS Pod Identity: pods may ask its agent (aws eks list-pod-identity-associations shows {accounts[0]})"
    raise UncertainError(
        f"{' and '.join(without)}: no role by IRSA, no secret in cluster.credentials_secret, and no network policy "
        "lets pods ask EKS Pod Identity's agent: give one of the three (manifests/components/eks-pod-identity)"
    )


def _may_ask_agent(cluster: KubernetesApi) -> bool:
    policies = cluster.list(_POLICIES.format(namespace=cluster.namespace))
    blocks = (
        target.get("ipBlock", {}).get("cidr")
        for policy in policies
        for rule in policy["spec"].get("egress") or ()
        for target in rule.get("to") or ()
    )
    return _AGENT in blocks
