"""The domain of lamps with a development suite, whose requests are such as its training data hold."""

from pathlib import Path

from taskagent_platform_tests.switch_domain import SwitchDomain


class SweptDomain(SwitchDomain):
    development_suites = (Path(__file__).with_name("swept_suite.json"),)


SWEPT = SweptDomain()
