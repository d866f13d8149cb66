"""A stand-in for a Kubernetes cluster: an API server over HTTP, and what plays controllers and kubelet behind it.

    store.py               objects, versions, what the API server checks; no HTTP
    server.py              the REST calls used, over HTTP as a real server answers them, and its faults
    controllers.py         the garbage collector, and what runs controllers and the kubelet
    kubelet.py             one node: the containers of pods are local processes
    training_operator.py   the training operator
    trainer.py             Kubeflow Trainer, JobSet and the Job controller

The API server alone has no controllers, as a real kube-apiserver with etcd has none.
"""
