"""Reads and works the comparison's page in a browser."""

PAINTED = (
    "const done = arguments[0]; "
    "requestAnimationFrame(() => requestAnimationFrame(() => done()))"
)


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def column(browser, header):
    """The texts of a column of the table, top to bottom."""
    script = """
    const table = document.getElementById("table");
    const index = [...table.tHead.rows[0].cells].findIndex(th => th.textContent === arguments[0]);
    return [...table.tBodies[0].rows].map(row => row.cells[index].textContent);"""
    return browser.execute_script(script, header)


def header(browser, name):
    return next(
        button for button in find(browser, "#table th button") if button.text == name
    )


def choose(browser, selector, text):
    next(
        option
        for option in find(browser, f"{selector} option")
        if option.text == text
    ).click()


def hover(browser, x, y):
    """Moves the mouse to a place in the plot, given in its own pixels."""
    from selenium.webdriver import ActionChains  # an extra

    plot = find(browser, "#scatter")[0]
    width, height = plot.size["width"], plot.size["height"]
    actions = ActionChains(browser, duration=0)
    actions.move_to_element_with_offset(
        plot, round(x - width / 2), round(y - height / 2)
    ).perform()
