"""What scipy and scikit-learn say, asked in AlpacaEval's environment.

They are in no environment of the project: transformers imports both where they are, two seconds of every process.
"""

import json
import subprocess
from typing import Any

import numpy as np

from tests.mlflow_server import ROOT, python_of

_SCRIPT = """
import json, sys
import numpy as np
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold

def logistic(features, preferences, c):
    # As AlpacaEval does: each preference is a row of either class with its weight.
    features, preferences = np.array(features), np.array(preferences)
    model = LogisticRegression(
        C=c, l1_ratio=1, solver="liblinear", fit_intercept=False, tol=1e-9, max_iter=100_000, random_state=0
    )
    labels = np.repeat([1, 0], len(preferences))
    model.fit(np.vstack([features, features]), labels, sample_weight=np.concatenate([preferences, 1 - preferences]))
    return model.coef_[0].tolist()

def folds(size, number):
    split = GroupKFold(number).split(np.zeros(size), groups=np.arange(size))
    return [[train.tolist(), test.tolist()] for train, test in split]

def sign_test(wins, losses):
    return binomtest(wins, wins + losses).pvalue

asked = json.load(sys.stdin)
json.dump([globals()[name](*arguments) for name, *arguments in asked], sys.stdout)
"""

Floats = Any


def ask(questions: list[list[Any]]) -> list[Any]:
    """Return the answers to questions, each a name and its arguments: all of a test in one process."""
    python = python_of(ROOT / "requirements" / "alpaca.lock")
    done = subprocess.run(
        [python, "-c", _SCRIPT], input=json.dumps(questions), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def logistic(features: Floats, preferences: Floats, c: float) -> list[Any]:
    """Return the question for the weights of an L1 logistic regression of soft preferences."""
    return ["logistic", np.asarray(features).tolist(), np.asarray(preferences).tolist(), float(c)]
