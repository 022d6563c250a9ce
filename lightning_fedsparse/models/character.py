"""The recurrent network of federated Shakespeare: an embedding, two LSTM layers and a linear layer.

The sizes are those of S. Caldas et al., "LEAF: A Benchmark for Federated Settings", 2018,
https://arxiv.org/abs/1812.01097, after H. B. McMahan, E. Moore, D. Ramage, S. Hampson, B. Aguera y Arcas,
"Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017,
https://arxiv.org/abs/1602.05629. It predicts after every character, not after the last of a window alone, as in S. Reddi et
al., "Adaptive Federated Optimization", ICLR 2021, https://arxiv.org/abs/2003.00295.
"""

from torch import Tensor, nn

__all__ = ["CharacterLSTM"]


class CharacterLSTM(nn.Module):
    """Two LSTM layers over embedded characters: 815,945 parameters for 65 symbols.

    Args:
        num_symbols: Number of different characters.
        embedding: Size of a character's embedding.
        hidden: Units of each LSTM layer.
    """

    def __init__(self, num_symbols: int = 65, *, embedding: int = 8, hidden: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_symbols, embedding)
        self.lstm = nn.LSTM(embedding, hidden, num_layers=2, batch_first=True)
        self.linear = nn.Linear(hidden, num_symbols)

    def forward(self, characters: Tensor) -> Tensor:
        """Map characters, int64 of shape (n, length), to logits of shape (n, length, num_symbols)."""
        states, _ = self.lstm(self.embedding(characters))
        logits: Tensor = self.linear(states)
        return logits
