// What chatfold is doing, as the server tells it.
const hint = document.getElementById("hint");
const source = new EventSource("/inspect/events");

source.addEventListener("message", (event) => {
  hint.textContent = hint.dataset.fine;
  for (const [name, value] of Object.entries(JSON.parse(event.data))) {
    const place = document.querySelector(`[data-fact="${CSS.escape(name)}"]`);
    if (place && place.textContent !== value) place.textContent = value;
  }
});
source.addEventListener("error", () => {
  hint.textContent = hint.dataset.lost;
});
