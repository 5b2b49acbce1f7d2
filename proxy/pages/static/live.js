// What chatfold is doing, as the server tells it.
const hint = document.getElementById("hint");
const source = new EventSource(hint.dataset.events ?? "/inspect/events");

source.addEventListener("message", (event) => {
  hint.textContent = hint.dataset.fine;
  const facts = JSON.parse(event.data);
  if ("over" in facts) {
    source.close();
    window.location.reload();
    return;
  }
  for (const [name, value] of Object.entries(facts)) {
    const place = document.querySelector(`[data-fact="${CSS.escape(name)}"]`);
    if (place && place.textContent !== value) place.textContent = value;
  }
});
source.addEventListener("error", () => {
  hint.textContent = hint.dataset.lost;
});
