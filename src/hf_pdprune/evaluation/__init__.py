from .benchmark import SpeedBenchmark
from .benchmark_config import BenchmarkConfig
from .quality import compare_quality, evaluate_quality
from .report import write_report
from .results import read_results, write_results


__all__ = [
    "BenchmarkConfig",
    "SpeedBenchmark",
    "compare_quality",
    "evaluate_quality",
    "read_results",
    "write_report",
    "write_results",
]
