// Addresses are relative to the page, so that it works behind a proxy's path prefix as well.
const service = new URL(".", window.location.href).href.replace(/\/$/, "");

async function start() {
  const answer = await fetch(`${service}/openapi.json`);
  if (!answer.ok) {
    throw new Error(`openapi.json answered ${answer.status}`);
  }
  const spec = await answer.json();
  // Requests that the page sends go to the service that it came from.
  spec.servers = [{ url: service }];
  window.SwaggerUIBundle({
    dom_id: "#swagger-ui",
    spec,
    deepLinking: true,
    docExpansion: "list",
    defaultModelsExpandDepth: 0,
    validatorUrl: null,
  });
}

start().catch((error) => {
  document.getElementById("swagger-ui").textContent = `The OpenAPI document did not load: ${error.message}`;
});
