"""A stand-in for a Kubernetes cluster: an API server over HTTP, and what plays controllers and kubelet behind it.

    store.py               objects, versions, what the API server checks; no HTTP
    server.py              the REST calls used, over HTTP as a real server answers them, and its faults
    training_operator.py   the training operator, the kubelet and the garbage collector: replicas are local processes

The API server alone has no controllers, as a real kube-apiserver with etcd has none.
"""
