from pathlib import Path


# For TaskManager(include_path=...) and lm_eval --include_path: task files that read JSON lines from a local folder.
LOCAL_TASKS_FOLDER = Path(__file__).parent
