"""Every object of the byte-identity tests: name -> factory."""

from corpus_modules import MODULES
from corpus_python import PYTHON
from corpus_tensors import TENSORS

CORPUS = {**TENSORS, **PYTHON, **MODULES}

assert len(CORPUS) == len(TENSORS) + len(PYTHON) + len(MODULES), "two corpora use one name"
