import counts


def pytest_terminal_summary(terminalreporter) -> None:
    if counts.done:
        terminalreporter.section("faults")
        terminalreporter.write_line(f"TORTURE_SEED={counts.SEED}")
        for line in counts.lines():
            terminalreporter.write_line(line)
