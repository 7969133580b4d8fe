import pytest

from hf_pdprune.pair_layout import by_stage, checkpoint_folders, layout_of, served_stages, stage_folders


def checkpoints(folder, *names):
    for name in names:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")
    return folder


def test_which_stages_a_checkpoint_serves():
    assert served_stages("decode") == ("decode",) and served_stages("unified") == ("prefill", "decode")
    with pytest.raises(ValueError, match="unknown stage 'both'; known: prefill, decode, unified"):
        served_stages("both")


def test_which_checkpoint_serves_a_stage():
    assert by_stage(["decode", "prefill"]) == {"prefill": "prefill", "decode": "decode"}
    assert by_stage(["unified"]) == {"prefill": "unified", "decode": "unified"}
    for names in (["unified", "decode"], ["prefill", "unified"]):
        with pytest.raises(ValueError, match="are both for the"):
            by_stage(names)


def test_folders_of_a_pair(tmp_path):
    checkpoints(tmp_path, "prefill", "decode")
    expected = {"prefill": tmp_path / "prefill", "decode": tmp_path / "decode"}
    assert checkpoint_folders(tmp_path) == stage_folders(tmp_path) == expected


def test_folder_of_a_unified_model(tmp_path):
    checkpoints(tmp_path, "unified")
    assert checkpoint_folders(tmp_path) == {"unified": tmp_path / "unified"}
    assert stage_folders(tmp_path) == {"prefill": tmp_path / "unified", "decode": tmp_path / "unified"}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no prefill stage: there is no prefill/config.json \(nor unified/config.json\)"
    ):
        stage_folders(tmp_path)
    with pytest.raises(FileNotFoundError, match="no decode stage: there is no decode/config.json"):
        stage_folders(checkpoints(tmp_path, "prefill"))


def test_two_pairs_in_one_place_are_refused():
    assert layout_of(["decode", "prefill"], "here") == ("prefill", "decode") and layout_of(["unified"], "x") == (
        "unified",
    )
    with pytest.raises(ValueError, match="prefill and unified are both for the prefill stage: remove one"):
        layout_of(["prefill", "decode", "unified"], "here")
