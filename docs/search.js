// A message often begins with an option; the search would leave out what follows a hyphen.
document.addEventListener("input", ({ target }) => {
  if (target.matches(".md-search__input")) {
    target.value = target.value.replace(/(^|\s)-+(?=\w)/g, "$1");
  }
});
