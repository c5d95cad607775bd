"""Assertions on the output of a command."""


def check_usage_error(result, message):
    """Assert that a command ended with an error line that contains the message."""
    assert result.exit_code == 2, result.output
    assert message in result.output, result.output
    assert "Traceback" not in result.output
    assert result.output.strip().splitlines()[-1].startswith("Error: ")
