from .annealing import AnnealingSearch
from .attention_mass import AttentionMass
from .block_statistics import BlockStatistics
from .calibration import Calibration
from .latency_goal import LatencyGoal
from .merged_pairs import MergedPairs
from .objective import Objective
from .operations import Operations
from .pareto_front import ParetoFront
from .removal_goal import BlockCounts
from .search_config import SearchConfig
from .search_journal import SearchJournal
from .search_plan import search_plan
from .stepwise import StepwiseSearch
from .token_aware_blocks import TokenAwareBlocks


__all__ = [
    "AnnealingSearch",
    "AttentionMass",
    "BlockCounts",
    "BlockStatistics",
    "Calibration",
    "LatencyGoal",
    "MergedPairs",
    "Objective",
    "Operations",
    "ParetoFront",
    "SearchConfig",
    "SearchJournal",
    "StepwiseSearch",
    "TokenAwareBlocks",
    "search_plan",
]
