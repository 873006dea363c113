"""What users type, as values."""

from recbole_ssm.arguments import names


def test_names_between_commas():
    assert names("SASRec, Mamba4Rec") == ["SASRec", "Mamba4Rec"]
    assert names(" a,,b, ") == ["a", "b"] and names("") == []
