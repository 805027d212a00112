"""Cut the documents of a corpus into rows of fixed length."""

import numpy as np

from ndtrain.data.corpus import Corpus
from ndtrain.data.row import IntArray

IGNORE = -100


class Samples:
    """Rows of S = seq_len tokens: dicts of int64 `[S]` input_ids, labels and position_ids.

    Labels are already shifted: labels[t] is the token after input_ids[t], or -100 if that token belongs to another
    document or carries no loss, or there is none. A target at a cut is not lost: the row reads one token past its end.

    With packing the stream of all documents is cut every S tokens. position_ids restart at 0 with each document and
    each row, and padding (in the last row only) counts as a document of its own.
    Without packing each document is cut into rows of at most S tokens, padded on the right; position_ids run from 0 to
    S - 1 through the padding, so that the row is one sequence.
    """

    def __init__(self, corpus: Corpus, seq_len: int, *, packing: bool, pad_id: int) -> None:
        self.corpus, self.seq_len, self.packing, self.pad_id = corpus, seq_len, packing, pad_id
        # A document's last token has no target, so a row that would hold only that token is left out.
        if packing:
            self._n = -(-(corpus.n_tokens - 1) // seq_len)
        else:
            rows = [(lengths - 1 + seq_len - 1) // seq_len for lengths in corpus.lengths()]
            self._first_row: IntArray = np.cumsum(np.concatenate([np.zeros(1, np.int64), *rows]))
            self._n = int(self._first_row[-1])

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> dict[str, IntArray]:
        if not 0 <= index < self._n:
            raise IndexError(f"sample {index} of {self._n}")
        size = self.seq_len
        if self.packing:
            start, limit = index * size, self.corpus.n_tokens
        else:
            doc = int(np.searchsorted(self._first_row, index, side="right")) - 1
            start, limit = self.corpus.bounds(doc)
            start += (index - int(self._first_row[doc])) * size
        stop = min(start + size + 1, limit)
        tokens = self.corpus.tokens(start, stop)
        filled = min(size, len(tokens))
        input_ids = np.full(size, self.pad_id, np.int64)
        labels = np.full(size, IGNORE, np.int64)
        position_ids = np.arange(size, dtype=np.int64)
        input_ids[:filled] = tokens[:filled]
        labels[: len(tokens) - 1] = tokens[1:]
        if self.corpus.masked:
            labels[: len(tokens) - 1][~self.corpus.loss(start + 1, stop)] = IGNORE
        if self.packing:
            starts = self.corpus.ends(start, start + size) - start  # of the next document or of the padding, 1 to S
            labels[starts - 1] = IGNORE
            starts, begins = starts[starts < size], np.zeros(size, np.int64)
            begins[starts] = starts
            position_ids -= np.maximum.accumulate(begins)
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
