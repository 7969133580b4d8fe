"""
Puts the stages of a pair on the Hub.

    python recipes/push.py outputs/demo me/my-model            # me/my-model-prefill and me/my-model-decode
    python recipes/push.py outputs/demo me/my-model --subfolders --private
"""

import argparse
import sys

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from hf_pdprune.hub import push_stages_to_hub


# Its first base: what all errors have of the HTTP library that this version of huggingface_hub is written with.
TransportError = HfHubHTTPError.__bases__[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="what recipes/prune.py or PDPruneTrainer.save_model wrote")
    parser.add_argument("repo_id", help="name or namespace/name; load_stages takes it for both stages")
    parser.add_argument("--subfolders", action="store_true", help="one repo with a folder for each stage")
    parser.add_argument("--private", action="store_true", default=None, help="make the repos private")
    parser.add_argument("--revision", help="branch to push to (default: main)")
    parser.add_argument("--commit_message", help="message of the commits")
    parser.add_argument("--collection", nargs="?", const=True, default=False, help="make a collection, of this title")
    args = parser.parse_args(arguments)
    try:
        for stage, url in push_stages_to_hub(**vars(args)).items():
            print(f"{stage}: {url}")
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError, RuntimeError, ValueError) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    except TransportError as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: cannot reach {constants.ENDPOINT}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
