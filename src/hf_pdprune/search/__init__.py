from .annealing import AnnealingSearch
from .attention_mass import AttentionMass
from .block_statistics import BlockStatistics
from .calibration import Calibration
from .objective import Objective
from .search_config import SearchConfig
from .search_journal import SearchJournal
from .search_plan import search_plan
from .token_aware_blocks import TokenAwareBlocks


__all__ = [
    "AnnealingSearch",
    "AttentionMass",
    "BlockStatistics",
    "Calibration",
    "Objective",
    "SearchConfig",
    "SearchJournal",
    "TokenAwareBlocks",
    "search_plan",
]
