"""A plugin for pytest: of the service's tests, leaves those that ask by HTTP, for a service that runs elsewhere.

They find it by SERVICE_URL, in the fixture `client`. What `LEFT_OUT` names looks into the process that answers, or
asks for what differs behind Ray's proxy.
"""

import pytest

LEFT_OUT = {
    "test_recipes_order_no_more_than_their_pictures_are": "counts the engine's calls",
    "test_a_request_that_has_begun_is_not_refused": "fills the queue from inside",
    "test_images_are_not_waited_for": "sends a body that its client breaks off",
    "test_large_pictures_are_few_at_a_time": "patches the process",
    "test_a_current_copy_is_not_sent_again": "counts the engine's calls",
    "test_an_animation_reserves_memory_for_its_pictures": "looks at the memory budget",
    "test_a_reply_reserves_memory_for_its_pictures": "looks at the memory budget",
    "test_what_making_a_reply_took_is_given_back_once_it_is_made": "looks at the memory budget",
    "test_a_bug_is_500_and_leaves_a_traceback": "patches the process",
    "test_a_body_of_a_wrong_type_is_not_read": "calls the application itself",
    "test_a_deadline_that_passes_is_504": "counts the engine's batches",
    "test_a_timeout_shortens_the_deadline": "holds the engine",
    "test_an_unheard_of_method_is_counted_as_other": "reads the registry",
    "test_all_outcomes_are_measured": "reads the registry",
    "test_a_rejection_is_counted_once_with_its_reason": "reads the registry",
    "test_each_request_is_one_line_of_fields": "reads the log",
    "test_probes_do_not_fill_the_log": "reads the log",
    "test_probes_do_not_wait_for_the_engine": "holds the engine",
    "test_probes_leave_no_spans": "reads the spans",
    "test_metrics_say_what_happened": "any replica may answer /metrics",
    "test_a_route_is_measured_by_its_template": "any replica may answer /metrics",
    "test_open_webui_gets_its_picture": "sends a header that no client can send over a socket",
    "test_other_errors_have_their_status_and_the_shape": "sends a Content-Length that no client can send over a socket",
    "test_a_long_accept_is_cut": "HAProxy refuses heads of 16 KiB, with 400 and a page of its own",
    "test_another_method_is_405[BREW-/metrics-GET, HEAD]": "HAProxy refuses unheard-of methods, with 400",
}


def names_of(item: pytest.Item) -> set[str]:
    """What a test may be called: its function's name, and its own, with parameters."""
    return {item.name, getattr(item, "originalname", item.name)}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect everything else."""
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        asks = "client" in getattr(item, "fixturenames", ()) and LEFT_OUT.keys().isdisjoint(names_of(item))
        (chosen if asks else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = chosen
