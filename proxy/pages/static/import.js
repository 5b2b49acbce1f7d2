// Sends a chosen file as it is, and says what came of it.
const form = document.getElementById("import");
const outcome = document.getElementById("outcome");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const [file] = document.getElementById("file").files;
  const button = form.querySelector("button");
  button.disabled = true;
  try {
    const response = await fetch("/inspect/import", {
      method: "POST",
      headers: { "content-type": "application/json", "x-chatfold-token": form.dataset.token },
      body: file,
    });
    const said = await response.json();
    outcome.textContent = said.said ?? said.error.message;
    outcome.classList.toggle("bad", !response.ok);
  } catch (error) {
    outcome.textContent = String(error);
    outcome.classList.add("bad");
  }
  outcome.hidden = false;
  button.disabled = false;
});
