import pytest

from lmkit.tokenization.train import train_tokenizer

SENTENCES = [
    "The lowest tower is older than the newest one, and the widest river runs below it.",
    "A little mouse wanted a new lantern; she didn't have 25 coins, so she asked the owl.",
    "def lower(words):\n    return [word.lower() for word in words]  # 3.14\n",
    "Caf\u00e9 na\u00efve \u65e5\u672c\u8a9e \u0434\u0430 \u2014 \U0001f642!\n\n\tEnd.",
]
DOCUMENTS = [f"{a}\n{b}" for a in SENTENCES for b in SENTENCES] * 3


@pytest.fixture(scope="session")
def documents():
    return DOCUMENTS


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(lambda: DOCUMENTS, vocab_size=384)
