# nbconvert --config nbs/static_html.py: the static twin of a widget, which needs neither kernel nor network.
c = get_config()  # noqa: F821
c.NbConvertBase.display_data_priority = ["text/html", "image/svg+xml", "image/png", "text/markdown",
                                         "text/plain"]
c.ExecutePreprocessor.store_widget_state = False
